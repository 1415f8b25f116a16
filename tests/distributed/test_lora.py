"""Adapters under ZeRO 0-3 and several heads, against plain torch and peft; a run with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

from dist_ft.engine.base import EngineOptions
from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
from dist_ft.engine.ds_config import DeepSpeedOptions
from dist_ft.engine.loss_module import LossModule
from dist_ft.model.backbone import HeadSpec, ModelSource, MultiTaskModel, build_model, load_model
from dist_ft.model.layer_groups import LayerGroup, find_layer_groups
from dist_ft.model.lora import LoraSettings, add_lora, fix_base, is_adapter, merged_lora
from dist_ft.optim.param_groups import LearningRates, build_param_groups
from dist_ft.tasks.text_classification import TextClassification
from dist_ft.train import finished
from dist_ft.train.export_adapter import export_adapter
from tests.helpers.phases import largest_difference
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny import TinyBatch
from tests.helpers.tiny_models import tiny_config
from tests.helpers.tiny_run import events, state_hash, train, write_recipe
from tests.helpers.tiny_tokenizers import wordpiece

STEPS, CHANGE = 20, 8
SETTINGS = LoraSettings(r=4, alpha=8.0, target_modules=("query", "value", "dense"))
TASKS = {"a": 3, "b": 2}
# A key's bias has no gradient, so a tiny epsilon would turn its rounding into steps.
OPTIONS = EngineOptions(seed=5, eps=1e-5, max_grad_norm=0.0)


def _model() -> tuple[MultiTaskModel, list[LayerGroup]]:
    heads = [
        HeadSpec(n, "AutoModelForSequenceClassification", {"num_labels": k})
        for n, k in TASKS.items()
    ]
    model = build_model(tiny_config("bert"), heads=heads, dtype=torch.float32, seed=0)
    add_lora(model, SETTINGS, seed=0)
    groups = fix_base(find_layer_groups(model), auto_classes={h.name: h.auto_class for h in heads})
    return model, groups


def _batch(step: int, index: int, classes: int) -> tuple[dict[str, Tensor], Tensor]:
    draw = torch.Generator().manual_seed(100 * step + index)
    ids = torch.randint(3, 40, (3, 7), generator=draw)
    mask = torch.tensor([[1] * n + [0] * (7 - n) for n in (7, 4, 2)])
    return {"input_ids": ids, "attention_mask": mask}, torch.randint(classes, (3,), generator=draw)


def _trained(groups: list[LayerGroup], step: int) -> list[str]:
    """The heads and the upper block first, then all."""
    return [g.name for g in groups if g.trained and (step >= CHANGE or g.name != "block.0")]


def _reference() -> dict[str, Tensor]:
    """Adapters, a head and an optimizer group each, in plain torch and peft."""
    ours, groups = _model()
    start = {n: p.detach().clone() for n, p in ours.named_parameters()}
    base = transformers.AutoModel.from_config(tiny_config("bert"))
    options: Any = {"r": 4, "lora_alpha": 8.0, "target_modules": ["query", "value", "dense"]}
    model: Any = peft.inject_adapter_in_model(peft.LoraConfig(**options), base)
    heads = {n: nn.Linear(model.config.hidden_size, k) for n, k in TASKS.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"backbone.{name}" in start:
                parameter.copy_(start[f"backbone.{name}"])
        for name, head in heads.items():
            head.weight.copy_(start[f"heads.{name}.classifier.weight"])
            head.bias.copy_(start[f"heads.{name}.classifier.bias"])
    parameters = {f"backbone.{n}": p for n, p in model.named_parameters() if is_adapter(n)}
    for name, head in heads.items():
        parameters |= {f"heads.{name}.classifier.{n}": p for n, p in head.named_parameters()}
    group_of = {n: g for g in groups for n in g.trained}
    assert parameters.keys() == group_of.keys()
    optimizers = {n: torch.optim.AdamW([p], lr=1e-3, eps=1e-5, weight_decay=0.1 * (p.dim() > 1))
                  for n, p in parameters.items()}  # fmt: skip
    model.eval()  # the dropout of the tiny configuration is off in both
    for step in range(STEPS):
        task = list(TASKS)[step % 2]
        loss = torch.zeros(())
        for index in range(2):
            inputs, labels = _batch(step, index, TASKS[task])
            pooled = model(**inputs).pooler_output
            loss = loss + nn.functional.cross_entropy(heads[task](pooled), labels, reduction="sum")
        for p in parameters.values():
            p.grad = None
        (loss / 6).backward()
        trained = _trained(groups, step)
        for name, optimizer in optimizers.items():
            if group_of[name].name in trained and task in group_of[name].tasks:
                optimizer.step()
    return {n: p.detach() for n, p in parameters.items()}


def _follows(expected: dict[str, Tensor], starts: dict[str, Tensor]) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for stage in range(4):
        model, groups = _model()
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        losses = {n: TextClassification(name=n, labels=("x", "y", "z")[:k]).loss
                  for n, k in TASKS.items()}  # fmt: skip
        engine = DeepSpeedEngine(
            LossModule(model, losses),
            param_groups=build_param_groups(
                groups,
                dimensions={n: p.dim() for n, p in model.named_parameters()},
                rates=LearningRates(1e-3),
                weight_decay=0.1,
            ),
            options=OPTIONS,
            deepspeed_options=DeepSpeedOptions(
                zero_stage=stage, micro_batch_size=3, gradient_accumulation_steps=1
            ),
        )
        for step in range(STEPS):
            if step in (0, CHANGE):
                report = engine.set_trainable(_trained(groups, step))
                assert report.frozen_params + report.trainable_params == sum(
                    p.numel() for p in starts.values()
                )
            task = list(TASKS)[step % 2]
            inputs, labels = _batch(step, rank, TASKS[task])
            engine.train_step(
                step,
                task=task,
                micro_batches=[TinyBatch(inputs, {"labels": labels}, rank)],
                global_count=6,
                learning_rates=dict.fromkeys((g.name for g in groups), 1e-3),
            )
        weights = engine.full_weights()
        if rank == 0:
            assert world == 2
            trained = {n: weights[n] for n in expected}
            assert largest_difference(trained, expected) <= 1e-5, stage
            moved = {n for n, w in weights.items() if not torch.equal(w, starts[n])}
            assert moved == expected.keys(), stage  # the base weights have not moved by a bit
        engine.close()


@pytest.mark.slow
def test_zero_follows_plain_torch_and_peft_through_a_phase_change() -> None:
    model, _ = _model()
    starts = {n: p.detach().clone() for n, p in model.named_parameters()}
    run_distributed(_follows, _reference(), starts)


def test_merging_is_undone_to_the_bit() -> None:
    model, _ = _model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    inputs, _ = _batch(0, 0, 3)
    with torch.no_grad():
        expected = model("a", inputs).logits
        with merged_lora(model):
            assert not any(is_adapter(n) for n, _ in model.named_parameters())
            torch.testing.assert_close(model("a", inputs).logits, expected)
    assert {n: p.tolist() for n, p in before.items()} == {
        n: p.tolist() for n, p in model.named_parameters()
    }


def test_unknown_layers_are_refused_with_the_names_that_there_are() -> None:
    heads = [HeadSpec("a", "AutoModelForSequenceClassification", {"num_labels": 3})]
    model = build_model(tiny_config("bert"), heads=heads, dtype=torch.float32, seed=0)
    with pytest.raises(ValueError, match=r"model\.lora\.target_modules: .*called dense, key, qu"):
        add_lora(model, LoraSettings(target_modules=("q_proj",)), seed=0)


@pytest.mark.parametrize("targets", [("query", "value"), ("all-linear",)])
def test_a_pooler_that_the_checkpoint_lacks_trains_and_is_exported_with_the_adapters(
    tmp_path: Path, targets: tuple[str, ...]
) -> None:
    base = tmp_path / "base"
    torch.manual_seed(0)
    transformers.AutoModelForMaskedLM.from_config(tiny_config("bert")).save_pretrained(base)
    heads = [HeadSpec("a", "AutoModelForSequenceClassification", {"num_labels": 3})]
    model = load_model(
        ModelSource(str(base)), heads=heads, dtype=torch.float32, seed=0, pad_token_id=0
    )
    pooler = {f"backbone.pooler.dense.{n}" for n in ("weight", "bias")}
    assert model.fresh == pooler
    settings = LoraSettings(r=2, target_modules=targets)
    add_lora(model, settings, seed=0)
    classes = {h.name: h.auto_class for h in heads}
    groups = fix_base(find_layer_groups(model), auto_classes=classes, fresh=model.fresh)
    trained = {n for g in groups for n in g.trained}
    assert {n for n in trained if not is_adapter(n) and not n.startswith("heads.")} == pooler
    with torch.no_grad():  # as after training
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.normal_(0, 0.3)
    inputs = {"input_ids": torch.tensor([[2, 7, 8, 9, 3]]), "attention_mask": torch.ones(1, 5)}
    with torch.no_grad():
        expected = model("a", inputs).logits
    folder = export_adapter(
        model, wordpiece(), task="a", folder=tmp_path / "out", settings=settings,
        card={"base_model": str(base), "revision": "v2", "recipe": {"model": {"path": str(base)}}},
    )  # fmt: skip
    assert json.loads((folder / "adapter_config.json").read_text())["revision"] == "v2"
    assert "revision='v2'" in (folder / "README.md").read_text()
    torch.manual_seed(9)  # another pooler
    fresh: Any = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    loaded = peft.PeftModel.from_pretrained(fresh, str(folder)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, expected)


@pytest.mark.slow
def test_a_run_with_adapters_resumes_and_exports_both_ways(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path,
        model={"lora": {"r": 4, "target_modules": ["query", "value"], "dropout": 0.1}},
        train={"max_duration": "12step"},
        checkpoint={"every": "6step"},
        evaluation={"every": "6step"},
        engine={"zero_stage": 3},
    )
    train(path, ["name=whole"])
    train(path, ["name=halves"], stop_at=6, exit_code=75)
    train(path, ["name=halves"], resume=True)
    run = tmp_path / "runs" / "whole"
    assert state_hash(run) == state_hash(tmp_path / "runs" / "halves")
    phases = [e for e in events(run) if e["event"] == "phase"]
    assert phases[-1]["trainable_params"] < phases[-1]["frozen_params"]

    _, parts, *_ = finished.open_finished(run)
    inputs = {
        "input_ids": torch.tensor([[2, 7, 8, 9, 3]]),
        "attention_mask": torch.ones(1, 5).long(),
    }
    with torch.no_grad():
        expected = parts.model("text", inputs).logits
    [merged] = finished.export(run, task="text")
    plain: Any = transformers.AutoModelForSequenceClassification.from_pretrained(merged)
    merged.rename(tmp_path / "merged")
    [adapter] = finished.export(run, task="text", how=finished.ExportOptions(lora="adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    base: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        config["base_model_name_or_path"], num_labels=2
    )
    beside = peft.PeftModel.from_pretrained(base, str(adapter))
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, expected)
        torch.testing.assert_close(beside(**inputs).logits, expected)
    assert not any("lora" in name for name in plain.state_dict())
