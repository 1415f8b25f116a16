"""Brings a run back to a checkpoint: at its start, or when its numbers have gone bad."""

from __future__ import annotations

from dist_ft import dist
from dist_ft.train.callbacks import Checkpoint
from dist_ft.train.checkpoint import (
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
    """
    if dist.rank() == 0:
        put_back(folder.checkpoints)
    path, passed_over = find_checkpoint(folder.checkpoints)
    for text in passed_over:
        console.say(f"checkpoint passed over: {text}")
    if dist.rank() == 0:
        set_aside(folder.checkpoints, [text.split(":")[0] for text in passed_over])
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


def _load(run: Run, reader: CheckpointReader) -> None:
    run.progress = Progress(**reader.trainer["progress"])
    run.policy.load_state_dict(reader.trainer["policy"])
    if run.balancer is not None and reader.trainer.get("balancing") is not None:
        run.balancer.load_state_dict(reader.trainer["balancing"])
    run.engine.set_trainable(reader.trainer["trainable"])
    run.engine.load_state(reader)


def go_back(run: Run, *, checkpoint: Checkpoint, folder: RunFolder) -> int | None:
    """Bring weights, optimizer and phase back to the newest whole checkpoint; return its step.

    The step count and the position in the data stay: what was trained since is not trained again.
    """
    checkpoint.settle(run)
    path, _ = find_checkpoint(folder.checkpoints)
    if path is None:
        return None
    run.beat("start")
    step, tokens, dropped = run.progress.step, run.progress.tokens, run.progress.dropped
    _load(run, CheckpointReader(path))
    start = run.progress.step
    run.progress.step, run.progress.tokens, run.progress.dropped = step, tokens, dropped
    # A crash before the next interval must not find the data that were given up.
    checkpoint.is_due = True
    return start
