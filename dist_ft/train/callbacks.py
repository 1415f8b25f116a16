"""Watchers of a run: metrics, evaluation, checkpoints."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_ft import dist
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
    positions: int = 0
    grad_norm: float | None = None
    wait_s: float = 0.0


@dataclass
class LogSteps(Watcher):
    """Writes a ``step`` event per task at every interval, and a ``phase`` event per change.

    Attributes:
        recorder: Where the events go.
        console: What a person sees.
        world: This rank's place.
        every: Steps of an interval.
        about: What the ``start`` event says of the run.
    """

    recorder: Recorder
    console: Console
    world: dist.World
    every: int
    about: Mapping[str, Any] = field(default_factory=dict)
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
        )
        self.console.phase(run.progress.step, phase, report)

    def on_step_end(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        """Add the step to its task's interval; write the events when the interval ends."""
        interval = self._intervals.setdefault(batch.task, _Interval())
        interval.steps += 1
        interval.loss = result.loss if interval.loss is None else interval.loss + result.loss
        interval.tokens += batch.global_tokens
        interval.positions += _positions(batch)
        interval.grad_norm = result.grad_norm
        interval.wait_s += batch.data_wait_s
        step = run.progress.step
        if step % self.every == 0 or step == run.total_steps:
            self._write(run)
        self.console.advance(step, task=batch.task)

    def _write(self, run: Run) -> None:
        # Time in steps alone: evaluations and checkpoints have figures of their own.
        seconds = max(1e-9, run.busy_s - self._busy_before_s)
        tasks = sorted(self._intervals)
        own = [float(_loss(self._intervals[t])) for t in tasks]
        own += [float(self._intervals[t].positions) for t in tasks]
        sums = dist.all_reduce_sum(own)
        tokens = sum(i.tokens for i in self._intervals.values())
        rates = run.learning_rates(run.progress.step - 1, run.progress.thawed_at)
        for task, loss_sum, positions in zip(tasks, sums, sums[len(tasks) :], strict=False):
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
                peak_rss_bytes=_peak_rss_bytes(),
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


def _loss(interval: _Interval) -> Tensor:
    return torch.zeros(()) if interval.loss is None else interval.loss


def _positions(batch: StepBatch) -> int:
    """Return the positions of this rank's input, padding and fillers counted."""
    return sum(b.inputs["input_ids"].numel() for b in batch.micro_batches)


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
                rows=scores.rows,
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
