"""Watchers of a run: metrics, evaluation, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dist_ft import dist
from dist_ft.data.augment.augmenter import AugmentStatistics
from dist_ft.data.loader import MicroBatch, StepBatch
from dist_ft.engine.base import PhaseReport, StepResult
from dist_ft.freezing.schedule import Phase
from dist_ft.train.console import Console
from dist_ft.train.evaluate import EvalData, Scores, evaluate_task
from dist_ft.train.intervals import (
    Interval,
    changes_over_ranks,
    over_all_ranks,
    peak_rss_bytes,
    positions_of,
    prefix_figures,
)
from dist_ft.train.loop import Run
from dist_ft.train.recorder import Recorder
from dist_ft.train.retention import worst_if_nan
from dist_ft.train.saving import CheckpointWriter, Saved
from dist_ft.train.stragglers import SlowRanks


class Watcher:
    """A callback that does nothing; the others override what they need."""

    def on_fit_start(self, run: Run) -> None:
        """Do nothing."""

    def on_phase(self, run: Run, phase: Phase, report: PhaseReport) -> None:
        """Do nothing."""

    def on_step_end(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        """Do nothing."""

    def on_fit_end(self, run: Run) -> None:
        """Do nothing."""


@dataclass
class LogSteps(Watcher):
    """Writes a ``step`` event per task at every interval, and a ``phase`` event per change.

    Attributes:
        recorder: Where the events go.
        console: What a person sees.
        world: This rank's place.
        every: Steps of an interval.
        slow_ranks: Looks at how long each rank takes.
        about: What the ``start`` event says of the run.
    """

    recorder: Recorder
    console: Console
    world: dist.World
    every: int
    slow_ranks: SlowRanks
    about: Mapping[str, Any] = field(default_factory=dict)
    _intervals: dict[str, Interval] = field(default_factory=dict)
    _busy_before_s: float = 0.0
    _wait_s: float = 0.0
    _trainable_params: int = 0

    def on_fit_start(self, run: Run) -> None:
        """Start the clock and the progress bar."""
        if run.progress.phase >= 0:  # resumed: the phase was entered before this callback was there
            self._trainable_params = sum(
                int(getattr(p, "ds_numel", p.numel()))
                for p in run.engine.module.parameters()
                if p.requires_grad
            )
            self.console.current_phase = run.progress.phase
        self.recorder.event(
            "start", step=run.progress.step, total_steps=run.total_steps, **self.about
        )
        self.console.start(run.total_steps, done=run.progress.step)

    def on_phase(self, run: Run, phase: Phase, report: PhaseReport) -> None:
        """Write the phase event, all of it measured from the engine."""
        self._trainable_params = report.trainable_params
        self.recorder.event(
            "phase",
            step=run.progress.step,
            phase=phase.index,
            trainable_groups=list(phase.trainable),
            trainable_params=report.trainable_params,
            frozen_params=report.frozen_params,
            optimizer_bytes_per_rank=report.optimizer_bytes,
            parked_bytes_per_rank=report.parked_bytes,
            gradient_bytes_per_step=report.gradient_bytes,
            switch=report.switch,
            switch_s=round(report.switch_s, 4),
            cached_blocks=report.cached_blocks,
            cache_bytes=report.cache_bytes,
            anchor_bytes_per_rank=report.anchor_bytes,
        )
        self.console.phase(run.progress.step, phase, report)

    def on_step_end(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        """Add the step to its task's interval; write the events when the interval ends."""
        if result.refused is None:  # otherwise it has an event of its own
            for index, turn in enumerate(batch.turns):
                self._count(turn, result, share=result.turn_shares[index])
            # Of the whole step: its turns go through the trunk in one.
            first = self._intervals[batch.task]
            first.count_prefix(result.prefix)
        self._wait_s += sum(turn.data_wait_s for turn in batch.turns)
        step = run.progress.step
        if self._intervals and (step % self.every == 0 or step == run.total_steps):
            self._write(run)
        self.console.advance(step, task=batch.task)

    def _count(self, batch: StepBatch, result: StepResult, *, share: float) -> None:
        interval = self._intervals.setdefault(batch.task, Interval())
        interval.steps += 1
        interval.loss += share
        interval.tokens += batch.global_tokens
        interval.positions += positions_of(batch)
        interval.grad_norm = result.grad_norm
        interval.wait_s += batch.data_wait_s
        if batch.augmentation is not None:
            interval.changes = interval.changes or AugmentStatistics()
            interval.changes.merge(batch.augmentation)

    def _write(self, run: Run) -> None:
        # Time in steps alone: evaluations and checkpoints have figures of their own.
        seconds = max(1e-9, run.busy_s - self._busy_before_s)
        tasks = sorted(self._intervals)
        own_s = self._wait_s + run.engine.own_seconds()
        sums, own_by_rank = over_all_ranks([self._intervals[t] for t in tasks], own_s=own_s)
        if run.busy_s > seconds:  # the first interval of a process builds what later ones find
            self.slow_ranks.see(run.progress.step, own_by_rank)
        changes = changes_over_ranks({t: self._intervals[t].changes for t in tasks})
        tokens = sum(i.tokens for i in self._intervals.values())
        rates = run.learning_rates(run.progress.step - 1, run.progress.thawed_at)
        for task, of_task in zip(tasks, sums, strict=True):
            loss_sum, positions, prefix_rows, prefix_found = of_task
            interval = self._intervals[task]
            loss = loss_sum / interval.steps
            self.recorder.event(
                "step",
                step=run.progress.step,
                task=task,
                loss=loss,
                lr=max(rates[g] for g in run.trainable_now()),
                grad_norm=interval.grad_norm,
                tokens=run.progress.tokens,
                tokens_per_s=round(tokens / seconds, 1),
                trainable_params=self._trainable_params,
                task_steps=interval.steps,
                task_tokens=interval.tokens,
                task_positions=int(positions),
                data_wait_s=round(interval.wait_s, 4),
                peak_rss_bytes=peak_rss_bytes(),
                **prefix_figures(interval, rows=prefix_rows, found=prefix_found),
                **({"augmentation": changes[task].to_json()} if task in changes else {}),
            )
            self.console.losses[task] = loss
        self.console.tokens_per_s = tokens / seconds
        self._intervals.clear()
        self._wait_s = 0.0
        self._busy_before_s = run.busy_s

    def on_fit_end(self, run: Run) -> None:
        """Write what is not written yet and take the progress bar away."""
        if self._intervals:
            self._write(run)
        self.console.stop()


@dataclass
class Evaluate(Watcher):
    """Scores every task at an interval and at the end, and writes ``eval`` events."""

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
            self.evaluate(run)

    def on_fit_end(self, run: Run) -> None:
        """Score a finished run that was resumed after its last step."""
        if run.progress.step == run.total_steps and self.done_at < 0:
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

    def evaluate(self, run: Run) -> None:
        """Score every task now, with the average of the weights if one is kept."""
        self.done_at = run.progress.step
        with run.engine.averaged():
            self._score(run)

    def _score(self, run: Run) -> None:

        def forward(task: str, micro_batch: MicroBatch) -> tuple[Tensor, Any]:
            run.beat("evaluation")
            return run.engine.eval_forward(task, micro_batch)

        for data in self.data:
            scores = evaluate_task(data, forward=forward, world=self.world)
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


@dataclass
class Checkpoint(Watcher):
    """Saves at an interval, at the end, and when the run is asked to stop.

    Attributes:
        writer: Writes beside the training.
        every: Steps between checkpoints that retention counts.
        ephemeral_every: Steps between those that only the next one outlives.
        in_background: Whether training goes on while files are written.
        describe: Returns what else a checkpoint says of the run.
        scores: Returns the latest scores, larger is better, if they are of this step.
        saved_at: Step of the newest checkpoint.
        is_due: Save at the end of this step in any case.
    """

    recorder: Recorder
    console: Console
    writer: CheckpointWriter
    every: int | None
    ephemeral_every: int | None
    in_background: bool
    describe: Callable[[], dict[str, Any]]
    scores: Callable[[int], dict[str, float]]
    saved_at: int = -1
    is_due: bool = False
    _owes_regular: bool = False

    def on_fit_start(self, run: Run) -> None:
        """Let updates wait for a copy, and make room for what a resumed run's save copies."""
        run.engine.before_change = self.writer.copied
        if run.progress.phase >= 0:
            self._prepare(run)

    def on_phase(self, run: Run, phase: Phase, report: PhaseReport) -> None:
        """Make room for what a save copies in this phase."""
        self._prepare(run)

    def _prepare(self, run: Run) -> None:
        if self.in_background:
            self.writer.prepare(run.engine.state())

    def on_step_end(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        """Save when an interval ends; see how far the save before is."""
        self._tell(self.writer.poll())
        step = run.progress.step
        regular = self._owes_regular or bool(self.every and step % self.every == 0)
        ephemeral = bool(self.ephemeral_every and step % self.ephemeral_every == 0)
        if run.progress.refused and not self.is_due:
            # Weights in doubt: going back to them would not help, and they would take the place of
            # those that do. The interval's checkpoint comes after the next good step.
            self._owes_regular = regular
            return
        if regular or ephemeral or self.is_due:
            self.is_due = self._owes_regular = False
            self._begin(run, ephemeral=not regular)
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
        self.recorder.event(
            "checkpoint", step=saved.step, path=saved.path.name, bytes=saved.bytes, **stall
        )
        self.console.say(
            f"step {saved.step}: saved {saved.path.name} ({saved.bytes / 2**20:.0f} MiB, "
            f"{saved.save_s:.1f} s, training waited {saved.stall_s:.2f} s)"
        )
