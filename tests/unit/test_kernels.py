"""Which kernels a run takes, and what it says where it can't take one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_ft.kernels import ops, self_tests
from dist_ft.kernels.ops import TABLE, Choice, Place, choose
from dist_ft.model.backbone import HeadSpec, build_model
from dist_ft.tasks.generation import Generation
from dist_ft.train.kernels import Kernels, take_kernels
from tests.helpers.tiny_models import tiny_config

CPU = torch.device("cpu")


def _take(model: str, said: list[str], policy: str = "auto", **settings: Any) -> Kernels:
    unset = dict.fromkeys(("label_smoothing", "r_drop", "adversarial", "cutoff", "mixup", "tasks"))
    regularization = unset | settings
    recipe: Any = SimpleNamespace(
        kernels=policy,
        engine=SimpleNamespace(precision="fp32"),
        regularization=SimpleNamespace(**regularization),
    )
    task = Generation(name="a")
    heads = [HeadSpec("a", task.auto_class, {})]
    built = build_model(tiny_config(model), heads=heads, dtype=torch.float32, seed=0)
    return take_kernels(recipe, built, tasks=[task], device=CPU, say=said.append)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_self_test_passes_here(dtype: torch.dtype) -> None:
    assert choose(Place("cpu", dtype), policy="auto", device=CPU) == {
        "attention": Choice("sdpa_by_run"),
        "linear_cross_entropy": Choice("chunked"),
    }


def test_reference_takes_nothing_else() -> None:
    found = choose(Place("cpu", torch.float32), policy="reference", device=CPU)
    assert set(found.values()) == {Choice("reference")}
    assert found.keys() == TABLE.keys()


def test_fp16_has_no_chunked_loss() -> None:
    found = choose(Place("cpu", torch.float16), policy="auto", device=CPU)
    assert found["linear_cross_entropy"] == Choice("reference")


@pytest.mark.parametrize("op", list(TABLE))
def test_a_wrong_implementation_is_not_taken(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = TABLE[op][-1]
    assert ops.test(one, device=CPU, dtype=torch.float32) is None
    monkeypatch.setattr(self_tests, "TOLERANCE", dict.fromkeys(self_tests.TOLERANCE, -1.0))
    reason = ops.test(one, device=CPU, dtype=torch.float32)
    assert reason is not None
    assert "differs from plain torch" in reason


def test_generation_computes_its_loss_in_the_head() -> None:
    said: list[str] = []
    kernels = _take("gpt2", said, label_smoothing=0.1)
    assert kernels.chosen["linear_cross_entropy"] == "chunked"
    assert kernels.fused["a"].label_smoothing == 0.1
    assert said == []


@pytest.mark.parametrize(
    ("model", "settings", "reason"),
    [
        ("gemma2", {}, "task a: it changes its logits after the head"),
        ("gpt2", {"r_drop": 1.0}, "task a: regularization.r_drop needs whole logits"),
    ],
)
def test_a_fallback_is_said_once_and_strict_refuses_it(
    model: str, settings: dict[str, Any], reason: str
) -> None:
    said: list[str] = []
    kernels = _take(model, said, **settings)
    assert (kernels.fused, kernels.chosen["linear_cross_entropy"]) == ({}, "reference")
    assert said == [f"kernels: linear_cross_entropy is run by plain torch: {reason}"]
    with pytest.raises(ValueError, match=f"kernels: strict, but .* {reason}"):
        _take(model, [], "strict", **settings)
    assert _take(model, said, "reference", **settings).fused == {}
    assert len(said) == 1
