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

# Warm-up, stable, decay (MiniCPM, Hu et al. 2024, section 4): constant until the last tenth.
WSD_DECAY = 0.1

# One cycle (Smith and Topin 2019, "Super-Convergence"), with the numbers and the two cosine halves
# of torch's OneCycleLR.
CYCLE_RISE, CYCLE_START, CYCLE_END = 0.3, 1.0 / 25, 1.0 / 25e4

SHAPES: dict[str, Shape] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "slanted_triangular": _linear,
    "wsd": _linear,
    "one_cycle": _cosine,
}


@dataclass(frozen=True)
class LrSchedule:
    """Factor on every peak learning rate, as a pure function of the step.

    Because nothing is accumulated, the schedule survives phase changes and resumes at any step.

    Attributes:
        type: A key of `SHAPES`.
        total_steps: Length of the run in steps.
        warmup_steps: Linear warm-up from 0; of ``one_cycle`` its cosine rise.
        min_ratio: The factor that the decay ends at.
        decay: Share of the run in which ``wsd`` decays.
    """

    type: str
    total_steps: int
    warmup_steps: int = 0
    min_ratio: float = 0.0
    decay: float = WSD_DECAY

    def __post_init__(self) -> None:
        if self.type not in SHAPES:
            known = ", ".join(SHAPES)
            raise ValueError(
                f"optim.schedule.type is one of {known}, got {self.type!r}: choose one"
            )

    def factor(self, step: int) -> float:
        """Return the factor for step `step` (the first is 0)."""
        if self.type == "one_cycle":
            return self._one_cycle(step)
        warmup, floor = self.warmup_steps, self.min_ratio
        if self.type == "slanted_triangular":
            warmup = warmup or max(1, int(self.total_steps * SLANTED_CUT))
            floor = floor or SLANTED_FLOOR
        if step < warmup:
            return (step + 1) / warmup
        begin = warmup
        if self.type == "wsd":
            begin = max(warmup, round(self.total_steps * (1 - self.decay)))
        done = min(1.0, max(0, step - begin) / max(1, self.total_steps - begin))
        return floor + (1.0 - floor) * SHAPES[self.type](done)

    def _one_cycle(self, step: int) -> float:
        """Return the factor: up to 1 in the rise, down to nearly 0 at the last step."""
        top = (self.warmup_steps or CYCLE_RISE * self.total_steps) - 1
        floor = self.min_ratio or CYCLE_END
        if step <= top:
            return 1.0 + (CYCLE_START - 1.0) * _cosine(step / max(1e-9, top))
        last = self.total_steps - 1
        return floor + (1.0 - floor) * _cosine(min(1.0, (step - top) / max(1e-9, last - top)))


def thaw_factor(step: int, *, thawed_at: int, warmup_steps: int) -> float:
    """Return the factor of a layer group that began to train at step `thawed_at`.

    A group that thaws late has empty Adam moments; a short linear warm-up keeps its first,
    sign-like updates small.
    """
    if thawed_at == 0 or step - thawed_at >= warmup_steps:
        return 1.0
    return (step - thawed_at + 1) / (warmup_steps + 1)
