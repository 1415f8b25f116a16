"""The watcher that writes ``step`` and ``phase`` events: losses, speed, what trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dist_ft import dist
from dist_ft.data.augment.augmenter import AugmentStatistics
from dist_ft.data.loader import StepBatch
from dist_ft.engine.base import PhaseReport, StepResult
from dist_ft.freezing.schedule import Phase
from dist_ft.train.callbacks import Watcher
from dist_ft.train.console import Console
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
from dist_ft.train.stragglers import SlowRanks


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
