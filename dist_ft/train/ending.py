"""How a run ends: done, stopped or failed, with what was being saved and what it holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_ft.train.callbacks import Checkpoint
from dist_ft.train.console import Console
from dist_ft.train.loop import Run, fit
from dist_ft.train.memory import FitMemory
from dist_ft.train.numbers import BadNumbersError
from dist_ft.train.recorder import Recorder
from dist_ft.train.signals import stop_name

log = logging.getLogger("dist_ft")

DONE, PREEMPTED = 0, 75


def checkpoint_of(run: Run) -> Checkpoint:
    """Return what saves a run."""
    return next(c for c in run.callbacks if isinstance(c, Checkpoint))


def train_to_end(run: Run, memory: FitMemory) -> None:
    """Train until the last step or until a rank is asked to stop.

    Raises:
        BadNumbersError: On every rank, after the same step; what was being saved then exists.
    """
    try:
        with memory.watching(run):
            fit(run)
    except BadNumbersError:
        checkpoint_of(run).settle(run)
        raise


def closing_trackers(recorder: Recorder, *, alone: bool) -> Callable[..., None]:
    """Return what an ExitStack closes a run's trackers with, and tells them of an error.

    A tracker that stays open takes the figures of the next run of its process. Of several ranks a
    failed one must leave first: a server that does not answer would keep the others waiting, and
    their processes' own ends tell the trackers.
    """

    def close(kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or alone:
            recorder.close(failed=kind is not None)

    return close


@contextmanager
def freed(run: Run, *, alone: bool) -> Iterator[None]:
    """Close what saves the run at the end of the block, and free its engine.

    Args:
        run: Of the block.
        alone: Whether this process is the only rank: a notebook's, which lives on however a run
            has ended. Those of several end with an error or a stop, and leave no time for it.
    """
    is_done = False
    try:
        yield
        is_done = not run.stopped_by
    finally:
        # Before another may write the run's folder, and before its weights are gone.
        checkpoint_of(run).writer.close()
        if is_done:
            run.engine.close()
        elif alone:
            try:
                run.engine.close()
            except Exception:
                log.exception("the engine of a run that has ended could not be freed")


def finish(run: Run, *, recorder: Recorder, console: Console, folder: Path) -> int:
    """Write how the run ended; return the exit code."""
    step = run.progress.step
    if run.stopped_by:
        recorder.event("stop", step=step, signal=run.stopped_by)
        console.say(
            f"step {step}: stopped by {stop_name(run.stopped_by)}"
            f"{' after saving' if run.progress.phase >= 0 else ''}; "
            "start the same command with --resume to go on"
        )
        return PREEMPTED
    run.discard()
    recorder.event("end", step=step)
    console.end_run(folder, step=step)
    return DONE
