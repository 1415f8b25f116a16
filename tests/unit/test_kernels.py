"""Which kernels a run takes, and what it says where it can't take one."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_ft.kernels import ops
from dist_ft.kernels.cases import DropoutCase
from dist_ft.kernels.ops import TABLE, Choice, Implementation, Operation, Place, choose
from dist_ft.model.backbone import HeadSpec, build_model
from dist_ft.model.layer_groups import find_layer_groups
from dist_ft.model.trunk import Trunk
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
        regularization=SimpleNamespace(dropout=SimpleNamespace(attention=None), **regularization),
    )
    task = Generation(name="a")
    heads = [HeadSpec("a", task.auto_class, {})]
    built = build_model(tiny_config(model), heads=heads, dtype=torch.float32, seed=0)
    return take_kernels(
        recipe, built, groups=find_layer_groups(built), tasks=[task], device=CPU, say=said.append
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_self_test_passes_here(dtype: torch.dtype) -> None:
    assert choose(Place("cpu", dtype), policy="auto", device=CPU) == {
        "attention": Choice("by_run"),
        "linear_cross_entropy": Choice("chunked"),
        "dropout_residual_norm": Choice("reference"),
        "dropout": Choice("by_byte"),
    }


def test_reference_takes_nothing_else() -> None:
    found = choose(Place("cpu", torch.float32), policy="reference", device=CPU)
    assert set(found.values()) == {Choice("reference")}
    assert found.keys() == TABLE.keys()


def test_fp16_has_no_chunked_loss() -> None:
    found = choose(Place("cpu", torch.float16), policy="auto", device=CPU)
    assert found["linear_cross_entropy"] == Choice("reference")


@pytest.mark.parametrize(
    ("op", "implementation"),
    [("attention", "by_run"), ("linear_cross_entropy", "chunked"), ("dropout", "by_byte")],
)
def test_a_wrong_implementation_is_not_taken(
    op: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = TABLE[op].case
    assert ops.test(case, implementation, device=CPU, dtype=torch.float32) is None
    right = type(case).run
    # One rounding of bf16 in what enters, a wrong scale, a wrong gradient of right values.
    wrongs: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda t: t.bfloat16().to(t), lambda t: 1.001 * t, lambda t: 1.001 * t - 0.001 * t.detach(),
    )  # fmt: skip
    for wrong in wrongs:

        def run(self: Any, name: str, *given: Tensor, change: Any = wrong) -> Tensor:
            return right(self, name, *map(change, given))

        monkeypatch.setattr(type(case), "run", run)
        reason = ops.test(case, implementation, device=CPU, dtype=torch.float32)
        assert reason is not None
        assert "differs from plain torch" in reason


def test_flash_attention_is_only_for_half_precision_without_dropout() -> None:
    (flash, _) = TABLE["attention"].implementations
    assert flash.predicate(Place("cuda", torch.bfloat16))
    assert not flash.predicate(Place("cuda", torch.bfloat16, attention_dropout=0.1))
    assert not flash.predicate(Place("cuda", torch.float32))
    assert not flash.predicate(Place("cpu", torch.bfloat16))


@pytest.mark.parametrize(
    ("model", "flat", "chosen", "runs"),
    [
        ("bert", True, "flash_varlen", "flash_varlen"),
        ("bert", True, "by_run", "by_run"),
        # A recipe may want plain torch and no padding: by row, in plain torch.
        ("bert", True, "reference", "by_run"),
        ("bert", False, "flash_varlen", "reference"),
        ("t5", True, "flash_varlen", "by_run"),  # its position bias is beyond flash
        ("bert of odd heads", True, "flash_varlen", "by_run"),
    ],
)
def test_the_attention_that_is_named_is_the_one_that_runs(
    model: str, flat: bool, chosen: str, runs: str
) -> None:
    config: Any = tiny_config(model.partition(" ")[0])
    config.pad_token_id = 0
    config.hidden_size = config.num_attention_heads * (12 if "odd" in model else 16)
    kind = "AutoModelForSeq2SeqLM" if model == "t5" else "AutoModelForSequenceClassification"
    built = build_model(config, heads=[HeadSpec("a", kind, {})], dtype=torch.float32, seed=0)
    trunk = Trunk.find(built, groups=find_layer_groups(built))
    trunk.flat = flat
    if flat and chosen == "flash_varlen" != runs:
        with pytest.raises(ValueError, match=r"kernels: strict, but attention .* by by_run, as"):
            Kernels({"attention": chosen}, {}, strict=True).settle_attention(trunk)
    kernels = Kernels({"attention": chosen}, {})
    kernels.settle_attention(trunk)
    assert kernels.chosen == {"attention": runs, "last_block": "reference"}
    assert trunk.flash == (runs == "flash_varlen")
    kernels.settle_attention(None)
    assert kernels.chosen == {"attention": "reference", "last_block": "reference"}


def test_post_norms_are_fused_where_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux")
    everywhere = Operation(
        (Implementation("triton", lambda _: True),), TABLE["dropout_residual_norm"].case
    )
    monkeypatch.setattr(ops, "TABLE", {**TABLE, "dropout_residual_norm": everywhere})
    monkeypatch.setattr(ops.self_tests, "errors", lambda *_, **__: [])
    said: list[str] = []
    assert _take("gpt2", said).chosen["dropout_residual_norm"] == "reference"  # it has none
    assert _take("bert", said).chosen["dropout_residual_norm"] == "triton"
    assert said == []
    # Without what runs it, its self-test fails, and plain torch runs it.
    monkeypatch.undo()
    monkeypatch.setattr(ops, "TABLE", {**TABLE, "dropout_residual_norm": everywhere})
    assert _take("bert", said).chosen["dropout_residual_norm"] == "reference"
    assert "dropout_residual_norm is run by plain torch: triton: its self-test failed" in said[0]
    with pytest.raises(ValueError, match="kernels: strict, but dropout_residual_norm"):
        _take("bert", [], "strict")
    _take("gpt2", said, "strict")  # it has none
    assert len(said) == 1


def test_dropout_modules_are_swapped_where_the_table_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    assert _take("gpt2", said).chosen["dropout"] == "by_byte"
    assert _take("gpt2", said, "reference").chosen["dropout"] == "reference"
    assert _take("llama", said).chosen["dropout"] == "reference"  # it has none
    monkeypatch.setattr(DropoutCase, "run", lambda *given: given[-1] * float("nan"))
    assert _take("llama", said, "strict").chosen["dropout"] == "reference"
    assert said == []
    assert _take("gpt2", said).chosen["dropout"] == "reference"
    assert "dropout is run by plain torch: by_byte: its self-test failed" in said[0]
    with pytest.raises(ValueError, match="kernels: strict, but dropout would"):
        _take("gpt2", [], "strict")


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
