"""Brings a run back to a checkpoint: at its start, or when its numbers have gone bad."""

from __future__ import annotations

from dist_ft import dist
from dist_ft.train.callbacks import Checkpoint
from dist_ft.train.checkpoint import (
    CheckpointError,
    CheckpointReader,
    find_checkpoint,
    put_back,
    set_aside,
)
from dist_ft.train.console import Console
from dist_ft.train.loop import Progress, Run
from dist_ft.train.mix import FollowLosses
from dist_ft.train.recorder import Recorder
from dist_ft.train.run_folder import RunFolder


def restore(run: Run, *, folder: RunFolder, recorder: Recorder, console: Console) -> None:
    """Bring a run back to its newest whole checkpoint, if there is one.

    The order matters: progress, then the phase, then the engine's state, then the data; the loop
    starts the iterator only afterwards.

    Raises:
        CheckpointError: If there are checkpoints, but none that can be read: to start at step 0
            then would replace them.
    """
    if dist.rank() == 0:
        put_back(folder.checkpoints)
    path, passed_over = find_checkpoint(folder.checkpoints)
    if path is None and passed_over:
        raise CheckpointError(
            f"{folder.checkpoints} has no whole checkpoint ({'; '.join(passed_over)}): put a copy "
            "of one there, or move them away to start at step 0. Nothing was changed"
        )
    _pass_over(passed_over, folder=folder, console=console)
    if path is None:
        recorder.event("resume", step=0, path=None)
        console.say(f"{folder.root} has no checkpoint: training starts at step 0")
        return
    reader = CheckpointReader(path)
    _load(run, reader)
    for callback in run.callbacks:
        if isinstance(callback, FollowLosses):
            # What it has decided is part of the order that is compared.
            callback.mixture.load_state(reader.trainer["data"]["mixture"])
    run.loader.check_state(reader.trainer["data"])
    for callback in run.callbacks:
        if isinstance(callback, Checkpoint):
            callback.saved_at = run.progress.step
    recorder.event("resume", step=run.progress.step, path=path.name)
    console.say(f"step {run.progress.step}: resumed from {path.name}")


def _pass_over(damaged: list[str], *, folder: RunFolder, console: Console) -> None:
    """Say which checkpoints are damaged, and see that nobody counts them as checkpoints."""
    for text in damaged:
        console.say(f"checkpoint passed over: {text}")
    if dist.rank() == 0:
        set_aside(folder.checkpoints, [text.split(":")[0] for text in damaged])


def _load(run: Run, reader: CheckpointReader) -> None:
    run.progress = Progress(**reader.trainer["progress"])
    run.policy.load_state_dict(reader.trainer["policy"])
    if run.balancer is not None and reader.trainer.get("balancing") is not None:
        run.balancer.load_state_dict(reader.trainer["balancing"])
    run.engine.set_trainable(reader.trainer["trainable"], loads=True)
    run.engine.load_state(reader)


def go_back(run: Run, *, checkpoint: Checkpoint, folder: RunFolder) -> int | None:
    """Bring weights, optimizer and phase back to the newest checkpoint that is not in doubt.

    The step count and the position in the data stay: what was trained since is not trained again.

    Returns:
        The checkpoint's step, or None if there is none.
    """
    checkpoint.settle(run)
    for up_to in _undoubted(run.progress):
        path, damaged = find_checkpoint(folder.checkpoints, up_to=up_to)
        _pass_over(damaged, folder=folder, console=checkpoint.console)
        if path is not None:
            break
    else:
        return None
    run.beat("start")
    step, tokens, dropped = run.progress.step, run.progress.tokens, run.progress.dropped
    _load(run, CheckpointReader(path))
    start = run.progress.step
    run.progress.step, run.progress.tokens, run.progress.dropped = step, tokens, dropped
    # A crash before the next interval must not find the data that were given up.
    checkpoint.is_due = True
    return start


def _undoubted(progress: Progress) -> list[int]:
    """Return the steps up to which a checkpoint may have other weights than those in doubt.

    The first one is the better one; the next is for where it finds nothing.
    """
    last_good = progress.step - progress.refused
    steps = [last_good]
    if progress.dropped and progress.dropped[-1][1] == last_good:
        # Not one good step since the roll-back before: the weights that it found don't help.
        steps.insert(0, progress.dropped[-1][0] - 1)
    return steps
