"""What a run does when its numbers go bad: leave the update out, and if it goes on, go back.

The engine leaves out an update whose loss or gradient is not finite, on all ranks alike, without
touching weights, moments or step counts; learning rates and phases follow the step, which is
counted. After some such steps in a row the weights themselves are in doubt: they go back to the
last checkpoint, and the data since then are given up (Chowdhery et al. 2022, PaLM, section 5.1).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from dist_ft import dist
from dist_ft.config import BadNumbersConfig
from dist_ft.data.loader import StepBatch
from dist_ft.engine.base import StepResult
from dist_ft.train.callbacks import Watcher
from dist_ft.train.console import Console
from dist_ft.train.loop import Run
from dist_ft.train.recorder import Recorder

# Fewer losses than these say nothing about what is usual.
_FEWEST_LOSSES = 5


class BadNumbersError(RuntimeError):
    """A run whose numbers stay bad."""


@dataclass
class GuardNumbers(Watcher):
    """Records updates that were left out, and takes the run back after several in a row.

    Attributes:
        config: When to go back, and what counts as a leap of the loss.
        go_back: Brings weights and optimizer back to the newest checkpoint from before the bad
            steps and returns its step, or None if there is none.
    """

    recorder: Recorder
    console: Console
    config: BadNumbersConfig
    go_back: Callable[[Run], int | None]

    def loss_limit(self, run: Run, task: str) -> float:
        """Return the largest loss that is no leap: a multiple of the median of the last ones."""
        losses = run.progress.losses.get(task, [])
        if self.config.spike_factor is None or len(losses) < _FEWEST_LOSSES:
            return float("inf")
        return self.config.spike_factor * statistics.median(losses)

    def on_step_end(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        """Look at the step; all ranks hold the same answer.

        Raises:
            BadNumbersError: If going back does not help, or there is nothing to go back to.
        """
        if result.refused is None:
            run.progress.refused = 0
            if self.config.spike_factor is not None:
                self._remember(run, batch, result)
            return
        run.progress.refused += 1
        self._record(run, batch, result)
        if run.progress.refused >= self.config.roll_back_after:
            self._roll_back(run)

    def _remember(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        for turn, loss in zip(batch.turns, result.turn_losses, strict=True):
            losses = run.progress.losses.setdefault(turn.task, [])
            losses.append(loss)
            del losses[: -self.config.spike_window]

    def _record(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        by_rank = dist.all_gather_object(result.turn_shares)
        for index, selected in enumerate(run.loader.turns_of(batch.step)):
            self.recorder.event(
                "bad_numbers",
                step=run.progress.step,
                task=selected.task,
                why=result.refused,
                in_a_row=run.progress.refused,
                # JSON has no NaN.
                loss_by_rank=[str(shares[index]) for shares in by_rank],
                rows=selected.rows.tolist(),
                epochs=selected.epochs.tolist(),
            )
        self.console.say(
            f"WARNING: step {run.progress.step} ({batch.task}) left out: {result.refused}; its "
            "rows are in metrics.jsonl"
        )

    def _roll_back(self, run: Run) -> None:
        end = run.progress.step
        dropped = list(run.progress.dropped)
        if len(dropped) >= self.config.max_roll_backs:
            raise BadNumbersError(
                f"step {end}: loss or gradient stay bad after {len(dropped)} roll-backs: look at "
                "the rows of the bad_numbers events; --resume with a larger "
                "train.on_bad_numbers.max_roll_backs, or start a run with a lower optim.lr"
            )
        start = self.go_back(run)
        if start is None:
            raise BadNumbersError(
                f"step {end}: loss or gradient were bad {run.progress.refused} times in a row and "
                "there is no checkpoint to go back to: start a run with a lower optim.lr, or set "
                "checkpoint.every"
            )
        run.progress.dropped = [*dropped, [start, end]]
        run.progress.refused = 0
        self.recorder.event("roll_back", step=end, to_step=start)
        self.console.say(
            f"step {end}: {self.config.roll_back_after} bad steps in a row; weights and optimizer "
            f"are those of step {start} again, the data since then are given up"
        )
