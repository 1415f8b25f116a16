"""Lets a mixture that follows the losses decide, once for all ranks."""

from __future__ import annotations

from collections.abc import Sequence

from dist_ft import dist
from dist_ft.data.bandit import BanditMixture
from dist_ft.data.loader import StepBatch
from dist_ft.engine.base import StepResult
from dist_ft.train.callbacks import Watcher
from dist_ft.train.loop import Run
from dist_ft.train.recorder import Recorder


class FollowLosses(Watcher):
    """Gives every step's loss to the mixture and writes a ``mixture`` event per decision.

    The losses are summed over the ranks in every step, which waits for the device: the mixture
    is part of every checkpoint, so it may not have losses that only one rank knows.

    Args:
        mixture: The mixture that the loader reads from.
        tasks: The tasks' names in its order.
        recorder: Where the events go.
    """

    def __init__(self, mixture: BanditMixture, *, tasks: Sequence[str], recorder: Recorder) -> None:
        self.mixture = mixture
        self._tasks = list(tasks)
        self._recorder = recorder

    def on_step_end(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        """Observe the loss; decide if it is time to."""
        if result.refused is not None:  # by every rank: such a loss says nothing
            return
        (loss,) = dist.all_reduce_sum([float(result.loss)])
        task = self._tasks.index(batch.task)
        shares = self.mixture.observe(loss, task=task, done=run.progress.step)
        if shares is None:
            return
        # The sums are the same everywhere, but an exponential may not be to the last bit.
        shares = dist.broadcast_object(shares)
        self._recorder.event(
            "mixture",
            step=run.progress.step,
            from_step=self.mixture.decided_steps,
            shares={name: round(share, 4) for name, share in zip(self._tasks, shares, strict=True)},
        )
        self.mixture.decide(shares)
