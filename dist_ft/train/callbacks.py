"""Watchers of a run: metrics, evaluation, checkpoints."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_ft import dist
from dist_ft.data.augment.augmenter import AugmentStatistics
from dist_ft.data.loader import StepBatch
from dist_ft.engine.base import PhaseReport, StepResult
from dist_ft.freezing.schedule import Phase
from dist_ft.train.checkpoint import save_checkpoint
from dist_ft.train.console import Console
from dist_ft.train.evaluate import EvalData, Scores, evaluate_task
from dist_ft.train.loop import Run
from dist_ft.train.recorder import Recorder


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
class _Interval:
    """What one task did since the last step event; the loss stays on the device until then."""

    steps: int = 0
    loss: Tensor | None = None
    tokens: int = 0
    grad_norm: float | None = None
    wait_s: float = 0.0
    prefix_rows: int = 0
    prefix_found: int = 0
    changes: AugmentStatistics | None = None


@dataclass
class LogSteps(Watcher):
    """Writes a ``step`` event per task at every interval, and a ``phase`` event per change."""

    recorder: Recorder
    console: Console
    world: dist.World
    every: int
    _intervals: dict[str, _Interval] = field(default_factory=dict)
    _busy_before_s: float = 0.0
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
        )
        self.console.phase(run.progress.step, phase, report)

    def on_step_end(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        """Add the step to its task's interval; write the events when the interval ends."""
        interval = self._intervals.setdefault(batch.task, _Interval())
        interval.steps += 1
        interval.loss = result.loss if interval.loss is None else interval.loss + result.loss
        interval.tokens += batch.global_tokens
        interval.grad_norm = result.grad_norm
        interval.wait_s += batch.data_wait_s
        interval.prefix_rows += result.prefix_rows
        interval.prefix_found += result.prefix_found
        if batch.augmentation is not None:
            interval.changes = interval.changes or AugmentStatistics()
            interval.changes.merge(batch.augmentation)
        step = run.progress.step
        if step % self.every == 0 or step == run.total_steps:
            self._write(run)
        self.console.advance(step, task=batch.task)

    def _write(self, run: Run) -> None:
        # Time in steps alone: evaluations and checkpoints have figures of their own.
        seconds = max(1e-9, run.busy_s - self._busy_before_s)
        tasks = sorted(self._intervals)
        sums = _sums_over_ranks([self._intervals[t] for t in tasks])
        changes = _over_ranks({t: self._intervals[t].changes for t in tasks})
        tokens = sum(i.tokens for i in self._intervals.values())
        rates = run.learning_rates(run.progress.step - 1, run.progress.thawed_at)
        for task, (loss_sum, prefix_rows, prefix_found) in zip(tasks, sums, strict=True):
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
                data_wait_s=round(interval.wait_s, 4),
                peak_rss_bytes=_peak_rss_bytes(),
                **({"prefix_hit_share": prefix_found / prefix_rows} if prefix_rows else {}),
                **({"augmentation": changes[task].to_json()} if task in changes else {}),
            )
            self.console.losses[task] = loss
        self.console.tokens_per_s = tokens / seconds
        self._intervals.clear()
        self._busy_before_s = run.busy_s

    def on_fit_end(self, run: Run) -> None:
        """Write what is not written yet and take the progress bar away."""
        if self._intervals:
            self._write(run)
        self.console.stop()


def _sums_over_ranks(intervals: Sequence[_Interval]) -> list[tuple[float, ...]]:
    """Return each interval's loss, rows with a cached prefix, and such rows that were found."""
    width = 3
    values = [
        value
        for i in intervals
        for value in (
            0.0 if i.loss is None else float(i.loss),
            float(i.prefix_rows),
            float(i.prefix_found),
        )
    ]
    sums = dist.all_reduce_sum(values)
    return [tuple(sums[start : start + width]) for start in range(0, len(sums), width)]


def _over_ranks(changes: dict[str, AugmentStatistics | None]) -> dict[str, AugmentStatistics]:
    """Return what all ranks changed together in the tasks that are augmented."""
    # Which tasks these are is the same on every rank.
    own = {task: counts for task, counts in changes.items() if counts is not None}
    if not own:
        return {}
    total = {task: AugmentStatistics() for task in own}
    for counts in dist.all_gather_object(own):
        for task, of_rank in counts.items():
            total[task].merge(of_rank)
    return total


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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

    def evaluate(self, run: Run) -> None:
        """Score every task now."""
        self.done_at = run.progress.step
        for data in self.data:
            scores = evaluate_task(data, forward=run.engine.eval_forward, world=self.world)
            self.last[scores.task] = scores
            self.recorder.event(
                "eval",
                step=run.progress.step,
                task=scores.task,
                split=scores.split,
                metrics=scores.metrics,
                eval_s=round(scores.seconds, 3),
            )
            self.console.scores(run.progress.step, scores)


@dataclass
class Checkpoint(Watcher):
    """Saves at an interval, at the end, and when the run is asked to stop."""

    recorder: Recorder
    console: Console
    folder: Path
    every: int | None
    keep_last: int
    describe: Callable[[], dict[str, Any]]
    saved_at: int = -1

    def on_step_end(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        """Save when the interval ends."""
        if self.every and run.progress.step % self.every == 0:
            self.save(run)

    def on_fit_end(self, run: Run) -> None:
        """Save what is not saved yet."""
        self.save(run)

    def save(self, run: Run) -> None:
        """Write a checkpoint of the run as it is now, unless there is one."""
        step = run.progress.step
        if step == self.saved_at or run.progress.phase < 0:
            return  # saved already, or stopped before there was anything to save
        began = time.monotonic()
        path, size = save_checkpoint(
            self.folder,
            step=step,
            state=run.engine.state(),
            trainer={**self.describe(), **run.state_dict()},
            keep_last=self.keep_last,
        )
        self.saved_at = step
        seconds = time.monotonic() - began
        self.recorder.event(
            "checkpoint", step=step, path=path.name, bytes=size, save_s=round(seconds, 3)
        )
        self.console.say(
            f"step {step}: saved {path.name} ({size / 2**20:.0f} MiB, {seconds:.1f} s)"
        )
