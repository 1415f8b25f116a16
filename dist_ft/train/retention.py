"""Which checkpoints stay: a pure function of what there is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


def worst_if_nan(score: float) -> float:
    """Return a score, larger is better, that can be compared: minus infinity in place of NaN.

    No score is larger than NaN, so one that got into a comparison would stay the best for good.
    """
    return -math.inf if math.isnan(score) else score


@dataclass(frozen=True)
class Kept:
    """What retention knows of a checkpoint.

    Attributes:
        step: Optimizer steps done.
        ephemeral: Whether it is there only until the next one, to lose little at a pre-emption.
        scores: Deciding validation metric of each task at that step, larger is better.
    """

    step: int
    ephemeral: bool = False
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Retention:
    """The rules.

    Attributes:
        keep_last: How many of the newest that are not ephemeral stay.
        keep_every: Those at multiples of this step stay for good; None keeps none for that.
        keep_best: Whether each task's best one stays.
    """

    keep_last: int = 2
    keep_every: int | None = None
    keep_best: bool = False

    def keeps(self, found: Sequence[Kept], *, newest: int) -> set[int]:
        """Return the steps that stay of the whole checkpoints up to `newest`, which always does.

        Those above `newest` are of a run that was taken up behind them; they go.
        """
        own = [kept for kept in found if kept.step <= newest]
        regular = sorted(kept.step for kept in own if not kept.ephemeral)
        keep = {newest, *regular[-self.keep_last :]}
        if self.keep_every:
            keep |= {step for step in regular if step % self.keep_every == 0}
        if self.keep_best:
            keep |= _best(own)
        return keep


def _best(found: Sequence[Kept]) -> set[int]:
    """Return the step of each task's best score, the earliest of equals."""
    tasks = {task for kept in found for task in kept.scores}
    return {
        max(
            (kept for kept in found if task in kept.scores),
            key=lambda kept: (kept.scores[task], -kept.step),
        ).step
        for task in tasks
    }
