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
        if run.progress.unscored is not None:
            return  # as the next evaluation was broken off as well
        self._decide(self.mixture.due(run.progress.step), step=run.progress.step)

    def on_scores(self, run: Run) -> None:
        """Observe the scores, and then the loss of their step if it waited for them."""
        scores = self._evaluate.last
        losses = [_validation_loss(scores.get(name)) for name in self._tasks]
        self.mixture.observe_scores(losses)
        if (unscored := run.progress.unscored) is not None:
            loss = math.nan if unscored["loss"] is None else unscored["loss"]
            self._observe(loss, task=unscored["task"], step=run.progress.step)

    def on_step_end(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        """Observe the loss; decide if it is time to."""
        if run.progress.unscored is not None:
            return  # it comes behind the scores, when the run goes on
        # A refused step's loss says nothing, but the next block may be due at it all the same.
        loss = math.nan if result.refused is not None else result.turn_losses[0]
        self._observe(loss, task=batch.task, step=run.progress.step)

    def _observe(self, loss: float, *, task: str, step: int) -> None:
        shares = self.mixture.observe(loss, task=self._tasks.index(task), done=step)
        self._decide(shares, step=step)

    def _decide(self, shares: list[float] | None, *, step: int) -> None:
        """Fix the shares of the next block if they are due, and tell so."""
        if shares is None:
            return
        # The sums are the same everywhere, but an exponential may not be to the last bit.
        agreed: list[float] = dist.broadcast_object(shares)
        self._recorder.event(
            "mixture",
            step=step,
            from_step=self.mixture.decided_steps,
            shares={name: round(share, 4) for name, share in zip(self._tasks, agreed, strict=True)},
        )
        self.mixture.decide(agreed)


def _validation_loss(scores: Scores | None) -> float:
    return math.nan if scores is None else scores.metrics["loss"]
