"""The table of operations: who else than plain torch may run them, where, and whether it is right.

For each operation the table lists implementations, best first. Each says for which device and type
it is made, and is compared with plain torch on a few numbers before it is used. Plain torch, called
``reference``, runs the rest.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from dist_ft.kernels import self_tests
from dist_ft.kernels.cases import AttentionCase, Case, DropoutCase, NormCase, ScoringCase

REFERENCE = "reference"
Policy = Literal["auto", "reference", "strict"]


@dataclass(frozen=True)
class Place:
    """What decides which implementations are made for a run.

    Attributes:
        device: type of the device: ``cpu``, ``cuda`` (also AMD's).
        dtype: type of weights and hidden states.
        attention_dropout: share of attention weights that are dropped in training.
    """

    device: str
    dtype: torch.dtype
    attention_dropout: float = 0.0


@dataclass(frozen=True)
class Implementation:
    """One way to run an operation.

    Attributes:
        name: its name in logs and records.
        predicate: whether it is made for a place.
    """

    name: str
    predicate: Callable[[Place], bool]


@dataclass(frozen=True)
class Operation:
    """One operation of the hot path.

    Attributes:
        implementations: who may run it, best first.
        case: on what each is tested before it is used.
    """

    implementations: tuple[Implementation, ...]
    case: Case


@dataclass(frozen=True)
class Choice:
    """What runs an operation.

    Attributes:
        implementation: its name.
        problem: why one that is made for the place does not run it.
    """

    implementation: str
    problem: str | None = None


def _on_gpu(place: Place) -> bool:
    return place.device == "cuda"


def _flash(place: Place) -> bool:
    # torch's variable-length attention drops no attention weights.
    half = place.dtype in (torch.float16, torch.bfloat16)
    return _on_gpu(place) and half and not place.attention_dropout


@cache
def has_triton() -> bool:
    """Return whether Triton can be imported: torch for CUDA and ROCm brings it along."""
    return importlib.util.find_spec("triton") is not None


TABLE: Mapping[str, Operation] = {
    "attention": Operation(
        (Implementation("flash_varlen", _flash), Implementation("by_run", lambda _: True)),
        AttentionCase((5, 3, 3), heads=2, key_heads=2, head_size=16),
    ),
    "linear_cross_entropy": Operation(
        # fp16 gradients are made before the loss scale is known, and would lose small values.
        (Implementation("chunked", lambda p: p.dtype != torch.float16),),
        # More than one chunk.
        ScoringCase(80, 16, 40, label_smoothing=0.1),
    ),
    "dropout_residual_norm": Operation(
        (Implementation("triton", lambda p: _on_gpu(p) and has_triton()),),
        NormCase(9, 40, p=0.25),
    ),
    "dropout": Operation(
        (Implementation("by_byte", lambda p: p.device == "cpu"),),
        DropoutCase(9, 40, p=0.3),
    ),
}


def choose(place: Place, *, policy: Policy, device: torch.device) -> dict[str, Choice]:
    """Return what runs each operation of the table.

    Args:
        place: where the run is.
        policy: ``reference`` takes nothing but plain torch.
        device: the device to test on.
    """
    return {op: _choose(found, place, policy=policy, device=device) for op, found in TABLE.items()}


def _choose(operation: Operation, place: Place, *, policy: Policy, device: torch.device) -> Choice:
    problem: str | None = None
    if policy == "reference":
        return Choice(REFERENCE)
    for one in operation.implementations:
        if not one.predicate(place):
            continue
        reason = test(operation.case, one.name, device=device, dtype=place.dtype)
        if reason is None:
            return Choice(one.name, problem)
        problem = problem or f"{one.name}: {reason}"
    return Choice(REFERENCE, problem)


def test(
    case: Case, implementation: str, *, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Return why an implementation can't be used on a device, None if its self-test passes."""
    try:
        self_tests.check(case, implementation, device=device, dtype=dtype)
    # Compilers and drivers raise what they like; whatever it is, plain torch runs instead.
    except Exception as error:  # noqa: BLE001
        text = str(error).strip().splitlines() or [type(error).__name__]
        return f"its self-test failed: {text[0]}"
    return None
