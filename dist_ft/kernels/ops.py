"""The table of operations: who else than plain torch may run them, where, and whether it is right.

For each operation the table lists implementations, best first. Each says for which device and type
it is made, and is compared with plain torch on a few numbers before it is
used. Plain torch, called ``reference``, runs the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from dist_ft.kernels import self_tests

REFERENCE = "reference"
Policy = Literal["auto", "reference", "strict"]


@dataclass(frozen=True)
class Place:
    """What decides which implementations are made for a run.

    Attributes:
        device: type of the device: ``cpu``, ``cuda`` (also AMD's).
        dtype: type of weights and hidden states.
    """

    device: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Implementation:
    """One way to run an operation.

    Attributes:
        name: its name in logs and records.
        predicate: whether it is made for a place.
        self_test: compares it with plain torch in a place; raises if they differ.
    """

    name: str
    predicate: Callable[[Place], bool]
    self_test: Callable[[torch.device, torch.dtype], None]


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


def _half(place: Place) -> bool:
    return place.dtype in (torch.float16, torch.bfloat16)


TABLE: Mapping[str, tuple[Implementation, ...]] = {
    "attention": (
        Implementation(
            "flash_varlen", lambda p: _on_gpu(p) and _half(p), self_tests.flash_attention
        ),
        Implementation("sdpa_by_run", lambda _: True, self_tests.attention_by_run),
    ),
    "linear_cross_entropy": (
        # fp16 gradients are made before the loss scale is known, and would lose small values.
        Implementation(
            "chunked", lambda p: p.dtype != torch.float16, self_tests.linear_cross_entropy
        ),
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


def _choose(
    found: tuple[Implementation, ...],
    place: Place,
    *,
    policy: Policy,
    device: torch.device,
) -> Choice:
    problem: str | None = None
    if policy == "reference":
        return Choice(REFERENCE)
    for one in found:
        if not one.predicate(place):
            continue
        reason = test(one, device=device, dtype=place.dtype)
        if reason is None:
            return Choice(one.name, problem)
        problem = problem or f"{one.name}: {reason}"
    return Choice(REFERENCE, problem)


def test(one: Implementation, *, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why an implementation can't be used on a device, None if its self-test passes."""
    try:
        one.self_test(device, dtype)
    # Compilers and drivers raise what they like; whatever it is, plain torch runs instead.
    except Exception as error:  # noqa: BLE001
        text = str(error).strip().splitlines() or [type(error).__name__]
        return f"its self-test failed: {text[0]}"
    return None
