"""What a person sees of a run: a progress bar and one line per event, from rank 0."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from dist_ft.config import Recipe
from dist_ft.engine.base import PhaseReport
from dist_ft.freezing.schedule import Phase
from dist_ft.tables import ProgressAbove
from dist_ft.train.evaluate import Scores
from dist_ft.train.reading import ReadingProgress
from dist_ft.wording import counted

log = logging.getLogger("dist_ft")

# Plain progress lines of a run: about so many, but one at each logging interval at most.
_LINES = 20
_MOST_INTERVALS = 10
# A pipe that nobody reads any more, a terminal that is closed: they do not come back.
_GONE = (errno.EPIPE, errno.EIO)


class _BestEffort:
    """A stream that may go away: what is printed then is lost, and the run goes on and saves.

    A stop often takes it away first: a terminal is closed, Ctrl-C also ends the `tee` of a pipe.
    rich would raise from whatever prints next, and on a broken pipe end the process.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._let_go(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._let_go(error)

    def _let_go(self, error: OSError) -> None:
        if error.errno in _GONE:  # else Python fails again to write the rest, as the process ends
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@dataclass
class Console:
    """Prints on rank 0; on a pipe it prints plain lines instead of a bar.

    Attributes:
        main: Whether this rank prints.
        every: Steps of a logging interval.
        losses: Latest mean training loss of each task.
        tokens_per_s: Latest throughput over all ranks, padding not counted.
        current_phase: Index of the phase.
    """

    main: bool
    every: int = 10
    losses: dict[str, float] = field(default_factory=dict)
    tokens_per_s: float = 0.0
    current_phase: int = 0
    _bar: ProgressAbove | None = None
    _total: int = 0
    _first: int = 0
    _started_s: float = 0.0

    def __post_init__(self) -> None:
        self._rich = RichConsole(file=cast(IO[str], _BestEffort(sys.stderr)), soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a line and log it."""
        log.info("%s", text)
        if self.main:
            self._rich.print(text, highlight=False, markup=False)

    def reading(self, name: str, expected: Callable[[], int | None]) -> ReadingProgress:
        """Return what shows how far reading a source has come."""
        terminal = self._rich if self.main and self._rich.is_terminal else None
        return ReadingProgress(name, expected=expected, say=self.say, terminal=terminal)

    def start(self, total: int, *, done: int) -> None:
        """Show the bar at `done` of `total` steps."""
        self._total, self._first, self._started_s = total, done, time.monotonic()
        if not (self.main and self._rich.is_terminal):
            return
        self._bar = ProgressAbove(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._rich,
        )
        self._bar.start()
        self._bar.add_task("training", total=total, completed=done, text="")

    def advance(self, step: int, *, task: str) -> None:
        """Show that `step` steps are done, the last one of `task`."""
        text = f"phase {self.current_phase} | {task} | {self._figures()}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, text=text)
            return
        intervals = min(_MOST_INTERVALS, max(1, self._total // (_LINES * self.every)))
        if step % (intervals * self.every) == 0 and step < self._total:
            each_s = (time.monotonic() - self._started_s) / max(1, step - self._first)
            left = duration_text(each_s * (self._total - step))
            self.say(f"step {step}/{self._total} | about {left} left | {text}")

    def _figures(self) -> str:
        losses = " ".join(f"{task} {loss:.3f}" for task, loss in sorted(self.losses.items()))
        return f"loss {losses or '-'} | {self.tokens_per_s:,.0f} tokens/s"

    def phase(self, step: int, phase: Phase, report: PhaseReport) -> None:
        """Say what trains from now on."""
        self.current_phase = phase.index
        total = report.trainable_params + report.frozen_params
        self.say(
            f"step {step}: phase {phase.index} trains {_short(phase.trainable)}: "
            f"{report.trainable_params:,} of {total:,} parameters, optimizer "
            f"{report.optimizer_bytes / 2**20:.1f} MiB per rank "
            f"({report.switch}, {report.switch_s:.2f} s)"
        )
        if report.cached_blocks:
            self.say(
                f"step {step}: the lowest {report.cached_blocks} blocks run once per row, without "
                f"dropout; up to {report.cache_bytes / 2**30:.2f} GiB of it are kept on disk "
                "(cache.policy: off computes them each time)"
            )

    def scores(self, step: int, scores: Scores) -> None:
        """Say what a task scored."""
        figures = ", ".join(f"{name} {value:.4f}" for name, value in scores.metrics.items())
        self.say(f"step {step}: {scores.task}/{scores.split}: {figures} ({scores.seconds:.1f} s)")

    def begin_run(
        self, recipe: Recipe, *, total_steps: int, world_size: int, device: str, folder: Path
    ) -> None:
        """Say what is about to run, on what, and where its files go."""
        rows = recipe.train.global_batch_size * recipe.mixture.tasks_per_step
        engine = recipe.engine
        kind = "reference engine" if engine.type == "reference" else f"ZeRO-{engine.zero_stage}"
        self.say(
            f"{_near(folder)}: {counted(total_steps, 'step')} ({recipe.train.max_duration}) of "
            f"{counted(rows, 'row')} on {counted(world_size, 'rank')}, {device}, "
            f"{engine.precision}, {kind}"
        )

    def end_run(self, folder: Path, *, step: int) -> None:
        """Say that training is done, at which step, how long it took and what can be done then."""
        took = duration_text(time.monotonic() - self._started_s)
        run = _near(folder)
        self.say(
            f"done: step {step:,} after {took}. Next: dist-ft evaluate {run}, dist-ft "
            f"export {run}, dist-ft report {run}"
        )

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def duration_text(seconds: float) -> str:
    """Return a duration in a unit that suits it, such as "14 s", "25 min" or "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _near(folder: Path) -> Path:
    """Return a folder as one types it from here."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _short(names: tuple[str, ...]) -> str:
    if len(names) <= 4:
        return ", ".join(names)
    return f"{names[0]} .. {names[-1]} ({len(names)} layer groups)"
