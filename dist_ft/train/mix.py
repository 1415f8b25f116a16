"""Lets a mixture that follows the losses decide, once for all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dist_ft import dist
from dist_ft.data.bandit import BanditMixture
from dist_ft.data.loader import StepBatch
from dist_ft.engine.base import StepResult
from dist_ft.train.callbacks import Evaluate, Watcher
from dist_ft.train.evaluate import Scores
from dist_ft.train.loop import Run


class FollowLosses(Watcher):
    """Gives every step's loss to the mixture and writes a ``mixture`` event per decision.

    Losses and scores are the same on every rank, as the mixture is part of every checkpoint.

    Args:
        mixture: The mixture that the loader reads from.
        evaluate: Holds the latest validation scores; it comes before this callback.
        tasks: The tasks' names in its order.
    """

    def __init__(self, mixture: BanditMixture, *, tasks: Sequence[str], evaluate: Evaluate) -> None:
        self.mixture = mixture
        self._evaluate = evaluate
        self._tasks = list(tasks)
        self._recorder = evaluate.recorder

    def on_fit_start(self, run: Run) -> None:
        """Decide what an earlier version of this package left undecided at a refused step."""
        self._decide(self.mixture.due(run.progress.step), step=run.progress.step)

    def on_step_end(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        """Observe the loss; decide if it is time to."""
        if self._evaluate.done_at == run.progress.step:
            scores = self._evaluate.last
            losses = [_validation_loss(scores.get(name)) for name in self._tasks]
            self.mixture.observe_scores(losses)
        # A refused step's loss says nothing, but the next block may be due at it all the same.
        loss = math.nan if result.refused is not None else result.turn_losses[0]
        task = self._tasks.index(batch.task)
        shares = self.mixture.observe(loss, task=task, done=run.progress.step)
        self._decide(shares, step=run.progress.step)

    def _decide(self, shares: list[float] | None, *, step: int) -> None:
        """Fix the shares of the next block if they are due, and tell so."""
        if shares is None:
            return
        # The sums are the same everywhere, but an exponential may not be to the last bit.
        shares = dist.broadcast_object(shares)
        self._recorder.event(
            "mixture",
            step=step,
            from_step=self.mixture.decided_steps,
            shares={name: round(share, 4) for name, share in zip(self._tasks, shares, strict=True)},
        )
        self.mixture.decide(shares)


def _validation_loss(scores: Scores | None) -> float:
    return math.nan if scores is None else scores.metrics["loss"]
