"""Watchers of a run: evaluation and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dist_ft import dist
from dist_ft.data.loader import MicroBatch, StepBatch
from dist_ft.engine.base import PhaseReport, StepResult
from dist_ft.freezing.schedule import Phase
from dist_ft.train.console import Console
from dist_ft.train.evaluate import EvalData, Forward, Scores, ScoringMemoryError, evaluate_task
from dist_ft.train.loop import Run, Unscored
from dist_ft.train.recorder import Recorder
from dist_ft.train.retention import worst_if_nan
from dist_ft.train.saving import CheckpointWriter, Saved


class Watcher:
    """A callback that does nothing; the others override what they need."""

    def on_fit_start(self, run: Run) -> None:
        """Do nothing."""

    def on_phase(self, run: Run, phase: Phase, report: PhaseReport) -> None:
        """Do nothing."""

    def on_step_end(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        """Do nothing."""

    def on_scores(self, run: Run) -> None:
        """Do nothing."""

    def on_fit_end(self, run: Run) -> None:
        """Do nothing."""


class _BrokenOffError(Exception):
    """An evaluation that all ranks leave at once, as one of them was asked to stop."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


@dataclass
class Evaluate(Watcher):
    """Scores every task at an interval and at the end, and writes ``eval`` events.

    A stop need not wait for the rest of an evaluation, which may be longer than whoever stops the
    run is patient: it is left, and done when the run goes on.
    """

    recorder: Recorder
    console: Console
    world: dist.World
    data: Sequence[EvalData]
    every: int | None
    last: dict[str, Scores] = field(default_factory=dict)
    done_at: int = -1

    def on_step_end(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        """Score when the interval ends."""
        step = run.progress.step
        if step == run.total_steps or (self.every and step % self.every == 0):
            loss = None if result.refused is not None else result.turn_losses[0]
            self.evaluate(run, unscored={"task": batch.task, "loss": loss})

    def on_fit_start(self, run: Run) -> None:
        """Score the step at which a stop broke the evaluation off."""
        if run.progress.unscored is not None:
            self.evaluate(run, unscored=run.progress.unscored)

    def on_fit_end(self, run: Run) -> None:
        """Score a finished run that was resumed after its last step."""
        if run.progress.step == run.total_steps and self.done_at < 0 and not run.stopped_by:
            self.evaluate(run)

    def deciding_scores(self, step: int) -> dict[str, float]:
        """Return each task's deciding metric, larger is better; empty if not scored at `step`.

        None of them is NaN: that counts as worse than every number.
        """
        if self.done_at != step:
            return {}
        found: dict[str, float] = {}
        for data in self.data:
            metric, larger_is_better = data.task.primary_metric
            value = self.last[data.task.name].metrics[metric]
            found[data.task.name] = worst_if_nan(value if larger_is_better else -value)
        return found

    def evaluate(self, run: Run, *, unscored: Unscored | None = None) -> None:
        """Score every task now, with the average of the weights if one is kept.

        Args:
            run: The run.
            unscored: What the run keeps of the step if it is asked to stop meanwhile.
        """
        try:
            with run.engine.averaged():
                self._score(run)
        except _BrokenOffError as stop:
            run.stopped_by, run.progress.unscored = stop.signal, unscored
            self.console.say(
                f"step {run.progress.step}: the evaluation is left, as the run is asked to stop"
            )
            return
        self.done_at = run.progress.step
        for callback in run.callbacks:
            callback.on_scores(run)
        run.progress.unscored = None

    def _score(self, run: Run) -> None:

        def forward(task: str, micro_batch: MicroBatch) -> tuple[Tensor, Any]:
            run.beat("evaluation")
            # Every rank has as many micro-batches, and asks before each of them.
            (signal,) = dist.all_reduce_max([run.stop_signal()])
            if signal:
                raise _BrokenOffError(signal)
            return run.engine.eval_forward(task, micro_batch)

        # Told once all are there: of an evaluation that is left nothing counts.
        for scores in [self._scores(data, forward) for data in self.data]:
            self.last[scores.task] = scores
            self.recorder.event(
                "eval",
                step=run.progress.step,
                task=scores.task,
                split=scores.split,
                metrics=scores.metrics,
                rows=scores.rows,
                eval_s=round(scores.seconds, 3),
                **({} if scores.correct is None else {"correct": scores.correct}),
            )
            self.console.scores(run.progress.step, scores)

    def _scores(self, data: EvalData, forward: Forward) -> Scores:
        try:
            return evaluate_task(data, forward=forward, world=self.world)
        except torch.OutOfMemoryError as error:
            # Of all tasks, so that no other one gets more than it had.
            smaller = min(data.micro_batch_size // 2, *(d.micro_batch_size for d in self.data))
            why = str(error).splitlines()[0]
            raise ScoringMemoryError(data.task.name, why, smaller=smaller) from error


@dataclass
class Checkpoint(Watcher):
    """Saves at an interval, at the end, and when the run is asked to stop.

    Attributes:
        writer: Writes beside the training.
        every: Steps between checkpoints that retention counts.
        keep_every: Steps between those that stay for good.
        ephemeral_every: Steps between those that only the next one outlives.
        in_background: Whether training goes on while files are written.
        describe: Returns what else a checkpoint says of the run.
        scores: Returns the latest scores, larger is better, if they are of this step.
        saved_at: Step of the newest checkpoint.
        is_due: Save at the end of this step in any case.
        on_saved: Hears the step of a checkpoint that is there.
    """

    recorder: Recorder
    console: Console
    writer: CheckpointWriter
    every: int | None
    keep_every: int | None
    ephemeral_every: int | None
    in_background: bool
    describe: Callable[[], dict[str, Any]]
    scores: Callable[[int], dict[str, float]]
    saved_at: int = -1
    is_due: bool = False
    on_saved: Callable[[int], None] | None = None
    _owes_regular: bool = False

    def on_fit_start(self, run: Run) -> None:
        """Let updates wait for a copy, and make room for what a resumed run's save copies."""
        run.engine.before_change = self.writer.copied
        if run.progress.phase >= 0:
            self._prepare(run)
        if self.is_due:  # by scores that were missing
            regular = self._is_regular(run.progress.step) or run.is_over
            self._save(run, ephemeral=not regular)

    def on_phase(self, run: Run, phase: Phase, report: PhaseReport) -> None:
        """Make room for what a save copies in this phase."""
        self._prepare(run)

    def _prepare(self, run: Run) -> None:
        if self.in_background:
            self.writer.prepare(run.engine.state())

    def on_scores(self, run: Run) -> None:
        """Save a step again that was saved without its scores."""
        self.is_due |= run.progress.unscored is not None

    def on_step_end(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        """Save when an interval ends; see how far the save before is."""
        self._tell(self.writer.poll())
        step = run.progress.step
        regular = self._is_regular(step)
        ephemeral = bool(self.ephemeral_every and step % self.ephemeral_every == 0)
        if run.progress.refused and not self.is_due:
            # Weights in doubt: going back to them would not help, and they would take the place of
            # those that do. The interval's checkpoint comes after the next good step.
            self._owes_regular = regular
            return
        if regular or ephemeral or self.is_due:
            self._save(run, ephemeral=not regular)

    def _is_regular(self, step: int) -> bool:
        ends = any(every and step % every == 0 for every in (self.every, self.keep_every))
        return self._owes_regular or ends

    def _save(self, run: Run, *, ephemeral: bool) -> None:
        self.is_due = self._owes_regular = False
        self._begin(run, ephemeral=ephemeral)
        if not self.in_background:
            self.settle(run)

    def on_fit_end(self, run: Run) -> None:
        """Save what is not saved yet.

        Raises:
            CheckpointError: If it cannot be saved: nobody may believe that it was.
        """
        self.settle(run)
        if run.progress.step == self.saved_at or run.progress.phase < 0:
            return  # saved already, or stopped before there was anything to save
        self._begin(run, ephemeral=not run.is_over)
        saved = self.settle(run)
        assert saved is not None
        saved.check()

    def _begin(self, run: Run, *, ephemeral: bool) -> None:
        run.beat("save")
        step = run.progress.step
        about = {"ephemeral": ephemeral, "scores": self.scores(step)}
        trainer = {**self.describe(), **about, **run.state_dict()}
        before = self.writer.begin(step=step, state=run.engine.state(), trainer=trainer)
        self._tell(before)
        self.saved_at = step

    def settle(self, run: Run) -> Saved | None:
        """Wait until nothing is being saved; return how the last save went, if it is news."""
        run.beat("save")
        saved = self.writer.wait()
        self._tell(saved)
        if saved is not None and saved.problem is not None:
            self.saved_at = -1
        return saved

    def _tell(self, saved: Saved | None) -> None:
        """Record how a save went; a failed one is no reason to stop training."""
        if saved is None:
            return
        stall = {"save_s": round(saved.save_s, 3), "stall_s": round(saved.stall_s, 4)}
        if saved.problem is not None:
            self.recorder.event(
                "checkpoint_failed", step=saved.step, problem=saved.problem, **stall
            )
            self.console.say(
                f"WARNING: the checkpoint of step {saved.step} was NOT written ({saved.problem}); "
                "training goes on, earlier checkpoints are intact"
            )
            return
        if self.on_saved is not None:
            self.on_saved(saved.step)
        self.recorder.event(
            "checkpoint", step=saved.step, path=saved.path.name, bytes=saved.bytes, **stall
        )
        self.console.say(
            f"step {saved.step}: saved {saved.path.name} ({saved.bytes / 2**20:.0f} MiB, "
            f"{saved.save_s:.1f} s, training waited {saved.stall_s:.2f} s)"
        )
