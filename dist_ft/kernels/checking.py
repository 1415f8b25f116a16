"""Says of this machine which kernels are made for it, whether they are right, and how quick."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dist_ft.kernels.cases import AttentionCase, Case, DropoutCase, NormCase, ScoringCase, inputs
from dist_ft.kernels.ops import TABLE, Place, has_triton
from dist_ft.kernels.self_tests import Error, errors

DTYPES = (torch.float32, torch.bfloat16)
# Odd sizes: single rows and tokens, nothing that is a multiple of a block, all rows of one length.
ODD: dict[str, tuple[Case, ...]] = {
    "attention": (
        AttentionCase((17, 1, 1, 5, 33), heads=3, key_heads=3, head_size=24),
        AttentionCase((7, 7, 2), heads=4, key_heads=2, head_size=8, causal=True),
        AttentionCase((1,), heads=1, key_heads=1, head_size=16),
    ),
    "linear_cross_entropy": (
        ScoringCase(131, 33, 517),
        ScoringCase(3, 8, 2, label_smoothing=0.1),
        ScoringCase(700, 24, 5001, label_smoothing=0.05),
    ),
    "dropout_residual_norm": (
        NormCase(5, 33, p=0.1),
        NormCase(1, 16, p=0.0),
        NormCase(9, 1000, p=0.3),
    ),
    "dropout": (
        DropoutCase(5, 33, p=0.1),
        DropoutCase(1, 1, p=0.5),
        DropoutCase(9, 1000, p=0.9),
        DropoutCase(4, 7, p=0.0),
    ),
}
# Sizes of fine-tuning that are timed. A CPU is slower, and has less patience to ask for.
_LENGTHS = (12, 27, 64, 33, 18, 41, 9, 22)
TIMED: dict[str, dict[str, Case]] = {
    "cuda": {
        "attention": AttentionCase(_LENGTHS * 16, heads=12, key_heads=12, head_size=64),
        "linear_cross_entropy": ScoringCase(4096, 2048, 128_000),
        "dropout_residual_norm": NormCase(16_384, 768, p=0.1),
        "dropout": DropoutCase(16_384, 768, p=0.1, seed=None),
    },
    "cpu": {
        "attention": AttentionCase(_LENGTHS * 2, heads=12, key_heads=12, head_size=32),
        "linear_cross_entropy": ScoringCase(256, 256, 8192),
        "dropout_residual_norm": NormCase(1024, 384, p=0.1),
        "dropout": DropoutCase(1024, 384, p=0.1, seed=None),
    },
}
_ROUNDS = 7


@dataclass(frozen=True)
class Finding:
    """What was found out about one implementation in one type.

    Attributes:
        op: the operation.
        implementation: its name in the table.
        dtype: the type.
        state: ``right``, ``wrong`` or ``not measured``.
        error: largest difference to float64 over outputs and gradients, as a share of its limit.
        detail: what is wrong, or why it was not measured.
        size: of what was timed.
        seconds: of a forward and a backward, the median of the rounds.
        ratio: of that to plain torch's, the median of ratios of the same round.
    """

    op: str
    implementation: str
    dtype: str
    state: str
    error: float | None = None
    detail: str = ""
    size: str | None = None
    seconds: float | None = None
    ratio: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it for a JSON file."""
        return asdict(self)


def interpreted() -> bool:
    """Return whether Triton's kernels run in its interpreter, and so on a CPU."""
    return has_triton() and os.environ.get("TRITON_INTERPRET") == "1"


def check_kernels(device: torch.device, *, timed: bool = True) -> Iterator[Finding]:
    """Yield a finding for each implementation of the table and each type.

    Args:
        device: where to run.
        timed: whether right implementations are timed, too.
    """
    for op, operation in TABLE.items():
        for one in operation.implementations:
            for dtype in DTYPES:
                name = str(dtype).removeprefix("torch.")
                in_interpreter = one.name == "triton" and device.type == "cpu" and interpreted()
                if not (one.predicate(Place(device.type, dtype)) or in_interpreter):
                    reason = _not_made(one.name, device=device, dtype=name)
                    yield Finding(op, one.name, name, "not measured", detail=reason)
                    continue
                found = _numerics(op, one.name, device=device, dtype=dtype)
                if timed and found.state == "right" and not in_interpreter:
                    try:
                        found = _timed(found, device=device, dtype=dtype)
                    except torch.OutOfMemoryError:
                        found = replace(found, detail="not timed: plain torch needs more memory")
                yield found


def _not_made(implementation: str, *, device: torch.device, dtype: str) -> str:
    if device.type == "cpu":
        more = (
            "; TRITON_INTERPRET=1 checks its numbers in the interpreter"
            if implementation == "triton" and has_triton()
            else ""
        )
        return f"no GPU{more}"
    if implementation == "triton" and not has_triton():
        return "Triton is not installed"
    return f"not made for {dtype} on {device.type}"


def _numerics(op: str, implementation: str, *, device: torch.device, dtype: torch.dtype) -> Finding:
    """Compare with float64 over the odd sizes; whatever a kernel raises is a finding."""
    name = str(dtype).removeprefix("torch.")
    worst = 0.0
    for case in ODD[op]:
        try:
            found = errors(case, implementation=implementation, device=device, dtype=dtype)
        except Exception as error:  # noqa: BLE001 - compilers and drivers raise what they like
            lines = str(error).strip().splitlines() or [type(error).__name__]
            detail = f"{case.size}: {lines[0]}"
            return Finding(op, implementation, name, "wrong", detail=detail)
        share, what = _worst(found)
        if not share <= 1:
            detail = f"{case.size}: {what}"
            return Finding(op, implementation, name, "wrong", share, detail)
        worst = max(worst, share)
    return Finding(op, implementation, name, "right", worst)


def _worst(found: Sequence[Error]) -> tuple[float, str]:
    # What is no number is worst.
    worst = max(found, key=lambda e: e.found / e.limit if e.found == e.found else float("inf"))
    text = f"{worst.what} is off by {worst.found:.1e}, plain torch by {worst.eager:.1e}"
    return worst.found / worst.limit, text


def _timed(found: Finding, *, device: torch.device, dtype: torch.dtype) -> Finding:
    case = TIMED[device.type][found.op]
    given = inputs(case, device=device, dtype=dtype)
    times = paired_times(
        {
            found.implementation: partial(case.run, found.implementation),
            "eager": case.eager,
        },
        given,
        rounds=_ROUNDS,
    )
    own, eager = times[found.implementation], times["eager"]
    return replace(
        found,
        size=case.size,
        seconds=statistics.median(own),
        ratio=statistics.median(a / b for a, b in zip(own, eager, strict=True)),
    )


def paired_times(
    functions: dict[str, Callable[..., Tensor]],
    given: Sequence[Tensor],
    *,
    rounds: int,
    warm_ups: int = 2,
) -> dict[str, list[float]]:
    """Return the seconds of a forward and a backward of each function in each round.

    The functions take turns, and every other round goes the other way round, so that a machine that
    gets slower or quicker hits all alike.

    Args:
        functions: by name, of what is given.
        given: tensors that want gradients.
        rounds: number of rounds that count.
        warm_ups: number of rounds before them.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(-warm_ups, rounds):
        names = list(functions) if number % 2 else list(reversed(functions))
        for name in names:
            took = _seconds(functions[name], given)
            if number >= 0:
                times[name].append(took)
    return times


def _seconds(function: Callable[..., Tensor], given: Sequence[Tensor]) -> float:
    wait = torch.cuda.synchronize if given[0].is_cuda else lambda: None
    wait()
    began = time.perf_counter()
    output = function(*given)
    torch.autograd.grad(output, given, torch.ones_like(output))
    wait()
    return time.perf_counter() - began
