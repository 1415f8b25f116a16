"""Post-norm sublayers whose end is fused: which are found, and that nothing else changes."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ft.kernels.dropout_norm import WIDEST, reference_dropout_residual_norm
from dist_ft.model.backbone import HeadSpec, MultiTaskModel, build_model
from dist_ft.model.post_norm import find_post_norms, fuse_post_norms
from tests.helpers.tiny_models import tiny_config

KIND = "AutoModelForSequenceClassification"


def _model(name: str, **settings: Any) -> MultiTaskModel:
    config: Any = tiny_config(name)
    config.pad_token_id = 0
    for key, value in settings.items():
        setattr(config, key, value)
    return build_model(config, heads=[HeadSpec("a", KIND, {})], dtype=torch.float32, seed=0)


def _layers(model: MultiTaskModel) -> int:
    config: Any = model.backbone.config
    return config.num_hidden_layers


def _inputs() -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _gradients(model: MultiTaskModel) -> list[Tensor]:
    torch.manual_seed(5)
    loss = model("a", _inputs())["logits"].square().sum()
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return [loss.detach(), *(g for g in found if g is not None)]


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie", "data2vec-text"]
)
def test_fused_models_train_as_before_under_the_same_mask(name: str) -> None:
    model = _model(name, hidden_dropout_prob=0.2).train()
    names = list(model.state_dict())
    plain = _gradients(model)
    found = find_post_norms(model, widest=WIDEST)
    assert len(found) == 2 * _layers(model)
    assert all(m.training for m in model.modules())
    calls: list[float] = []

    def counted(
        hidden: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, p: float, eps: float
    ) -> Tensor:
        calls.append(p)
        return reference_dropout_residual_norm(hidden, residual, weight, bias, p=p, eps=eps)

    fuse_post_norms(found, by=counted)
    fused = _gradients(model)
    assert calls == [0.2] * len(found)
    assert all(torch.equal(one, other) for one, other in zip(plain, fused, strict=True))
    assert list(model.state_dict()) == names
    # Nothing is fused twice, and evaluation drops nothing.
    assert find_post_norms(model, widest=WIDEST) == []
    model.eval()
    with torch.no_grad():
        model("a", _inputs())
    assert calls[len(found) :] == [0.0] * len(found)


def test_a_copy_has_its_own_weights() -> None:
    model = _model("bert")
    fuse_post_norms(find_post_norms(model, widest=WIDEST), by=reference_dropout_residual_norm)
    model.eval()
    before = model("a", _inputs())["logits"]
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model("a", _inputs())["logits"], before)
    assert not torch.equal(other("a", _inputs())["logits"], before)


@pytest.mark.parametrize(
    # Of MPNet's two in a layer, one is spread over its attention module.
    ("name", "of_a_layer"),
    [("gpt2", 0), ("llama", 0), ("distilbert", 0), ("mpnet", 1)],
)
def test_only_sublayers_of_this_form_are_found(name: str, of_a_layer: int) -> None:
    model = _model(name)
    found = find_post_norms(model, widest=WIDEST)
    assert len(found) == of_a_layer * _layers(model)
    assert find_post_norms(model, widest=1) == []


class _Other(nn.Module):
    """The parts of a post-norm sublayer, put together otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = nn.Linear(8, 4), nn.LayerNorm(4), nn.Dropout(0.5)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.dropout(self.LayerNorm(self.dense(hidden_states) + input_tensor))


def test_a_sublayer_that_computes_something_else_is_not_found() -> None:
    assert find_post_norms(_Other(), widest=WIDEST) == []
