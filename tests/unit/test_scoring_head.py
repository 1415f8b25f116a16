"""Heads that compute their loss: which models can, and that the model is left as it was."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_ft.engine.loss_module import FusedLoss, InTraining, LossModule
from dist_ft.model.backbone import HeadSpec, MultiTaskModel, build_model
from dist_ft.model.scoring_head import ScoringHead
from dist_ft.tasks.generation import Generation
from tests.helpers.tiny_models import tiny_config


def _model(name: str, **settings: Any) -> tuple[MultiTaskModel, Generation]:
    config: Any = tiny_config(name)
    config.pad_token_id = 0
    for key, value in settings.items():
        setattr(config, key, value)
    task = Generation(name="a", style="seq2seq" if config.is_encoder_decoder else "causal")
    heads = [HeadSpec("a", task.auto_class, {})]
    return build_model(config, heads=heads, dtype=torch.float32, seed=0), task


def _batch(task: Generation) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"labels": labels} if task.style == "seq2seq" else {}), {"labels": labels}


@pytest.mark.parametrize(
    "name", ["gpt2", "gptj", "llama", "qwen3", "gemma", "opt", "phi", "t5", "bart", "marian"]
)
def test_the_head_gives_loss_and_gradients_of_the_logits(name: str) -> None:
    model, task = _model(name)
    fused = FusedLoss(ScoringHead.find(model, "a"), task.logit_labels)
    if name == "marian":
        model.heads["a"].get_buffer("final_logits_bias").copy_(torch.linspace(-1, 1, 64))
    module = LossModule(model, {"a": task.loss}, in_training=InTraining(fused={"a": fused}))
    module.eval()
    inputs, targets = _batch(task)
    names, trained = zip(
        *((n, p) for n, p in module.named_parameters() if p.requires_grad), strict=True
    )
    seen: list[int] = []
    hook = fused.head.head.register_forward_hook(lambda *given: seen.append(given[2].numel()))
    results: list[Any] = []
    for training in (True, False):
        module.training = training  # alone, so that there is no dropout
        loss, outputs = module("a", inputs, targets)
        assert (outputs is None) == training
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        results.append((loss.detach(), *gradients))
    hook.remove()
    length = targets["labels"].numel()
    assert seen == [1, length * 64]  # evaluation keeps its logits
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
    for key, one, other in zip(names, results[0][1:], results[1][1:], strict=True):
        assert (one is None) == (other is None), key
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("gemma2", {}, "changes its logits after the head"),  # a cap
        ("cohere", {}, "changes its logits after the head"),  # a scale
        ("granite", {"logits_scaling": 4.0}, "changes its logits after the head"),
        ("prophetnet", {}, "does something else with its logits"),
    ],
)
def test_models_that_change_their_logits_are_refused(
    name: str, settings: dict[str, Any], reason: str
) -> None:
    model, task = _model(name, **settings)
    inputs, _ = _batch(task)
    before = model("a", inputs)["logits"]
    with pytest.raises(ValueError, match=reason):
        ScoringHead.find(model, "a")
    assert torch.equal(model("a", inputs)["logits"], before)


def test_a_head_that_is_no_linear_layer_is_refused() -> None:
    heads = [HeadSpec("a", "AutoModelForSequenceClassification", {})]
    model = build_model(tiny_config("bert"), heads=heads, dtype=torch.float32, seed=0)
    with pytest.raises(ValueError, match="its head is a NoneType"):
        ScoringHead.find(model, "a")


def test_the_model_is_as_before_after_scoring() -> None:
    model, task = _model("bart")
    inputs, targets = _batch(task)
    before = model("a", inputs)["logits"]
    head = ScoringHead.find(model, "a")
    with pytest.raises(KeyError), head.scoring(targets["labels"]):
        raise KeyError
    assert torch.equal(model("a", inputs)["logits"], before)
