"""Learning-rate shapes as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Shape = Callable[[float], float]


def _linear(done: float) -> float:
    return 1.0 - done


def _cosine(done: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * done))


def _constant(done: float) -> float:  # noqa: ARG001 - one signature for all shapes
    return 1.0


# Slanted triangular (ULMFiT, Howard and Ruder 2018, section 3.2) is a linear warm-up over a tenth
# of the run followed by a linear decay to 1/32 of the peak.
SLANTED_CUT, SLANTED_FLOOR = 0.1, 1.0 / 32

SHAPES: dict[str, Shape] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "slanted_triangular": _linear,
}


@dataclass(frozen=True)
class LrSchedule:
    """Factor on every peak learning rate, as a pure function of the step.

    Because nothing is accumulated, the schedule survives phase changes and resumes at any step.

    Attributes:
        type: A key of `SHAPES`.
        total_steps: Length of the run in steps.
        warmup_steps: Linear warm-up from 0.
        min_ratio: The factor that the decay ends at.
    """

    type: str
    total_steps: int
    warmup_steps: int = 0
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.type not in SHAPES:
            known = ", ".join(SHAPES)
            raise ValueError(
                f"optim.schedule.type is one of {known}, got {self.type!r}: choose one"
            )

    def factor(self, step: int) -> float:
        """Return the factor for step `step` (the first is 0)."""
        warmup, floor = self.warmup_steps, self.min_ratio
        if self.type == "slanted_triangular":
            warmup = warmup or max(1, int(self.total_steps * SLANTED_CUT))
            floor = floor or SLANTED_FLOOR
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
        return floor + (1.0 - floor) * SHAPES[self.type](done)


def thaw_factor(step: int, *, thawed_at: int, warmup_steps: int) -> float:
    """Return the factor of a layer group that began to train at step `thawed_at`.

    A group that thaws late has empty Adam moments; a short linear warm-up keeps its first,
    sign-like updates small.
    """
    if thawed_at == 0 or step - thawed_at >= warmup_steps:
        return 1.0
    return (step - thawed_at + 1) / (warmup_steps + 1)
