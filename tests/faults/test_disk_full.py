"""A full disk costs a checkpoint and some events, not the run."""

from __future__ import annotations

import errno
import os
import resource
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_ft.engine.parking import ParkedPrefix
from dist_ft.recipe import load_recipe
from dist_ft.train import build
from dist_ft.train.recorder import Recorder, read_events
from dist_ft.train.run_folder import RunFolder
from tests.helpers.run_distributed import run_distributed
from tests.helpers.supervised import before
from tests.helpers.tiny_run import events, newest_checkpoint, write_recipe


def limit_files(size: int) -> None:
    """Let writes beyond `size` bytes fail in this process, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _runs_full(recipe: Path) -> None:
    """Train with a disk that is full for rank 1 around step 8 and gone for both around step 12."""
    from dist_ft.engine.deepspeed_engine import DeepSpeedEngine

    def fill(call: int) -> None:
        if call == 7:
            limit_files(2000)
        if call == 11:
            limit_files(resource.RLIM_INFINITY)

    folder = recipe.parent / "runs/tiny/checkpoints"

    def take_away(call: int) -> None:
        if call == 12:
            folder.rename(folder.with_name("elsewhere"))
            folder.touch()  # no folder can be made there
        if call == 15:
            folder.unlink()
            folder.with_name("elsewhere").rename(folder)

    if os.environ["RANK"] == "1":
        before(DeepSpeedEngine, "train_step", fill)
    else:
        before(DeepSpeedEngine, "train_step", take_away)
    assert build.train(load_recipe(recipe), resume=False) == 0


def test_a_save_that_fails_leaves_the_older_one_and_the_run_goes_on(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        train={"max_duration": "20step"},
        checkpoint={"every": "4step", "keep_last": 1},
    )
    run_distributed(_runs_full, recipe)
    found = events(tmp_path / "runs/tiny")
    full, gone = [e for e in found if e["event"] == "checkpoint_failed"]
    assert (full["step"], gone["step"]) == (8, 12)
    assert full["problem"].startswith("rank 1: ")
    assert "File exists" in gone["problem"]
    assert [e["step"] for e in found if e["event"] == "checkpoint"] == [4, 16, 20]
    folder = newest_checkpoint(tmp_path / "runs/tiny").parent
    assert [path.name for path in folder.iterdir()] == ["step-00000020"]


def _needs_too_much(recipe: Path) -> None:
    from dist_ft.train import saving

    saving._FREE_SPACE_MARGIN = 2**60  # more than any disk has
    with pytest.raises(RuntimeError, match=r"rank 0: \d+ bytes are needed and \d+ are free"):
        build.train(load_recipe(recipe), resume=False)


def test_the_last_save_of_a_run_must_succeed_and_space_is_looked_at_first(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train={"max_duration": "4step"})
    run_distributed(_needs_too_much, recipe)
    assert not list((tmp_path / "runs/tiny/checkpoints").iterdir())


def _writes_notes_and_parks(folder: Path) -> None:
    run = RunFolder(folder)
    run.write_json("recipe.json", {"name": "whole"})
    layer = torch.nn.Linear(16, 16)
    before = [p.detach().clone() for p in layer.parameters()]
    # Room for: nothing, the weight and not the bias, both.
    for room, parked_bytes in ((20, 0), (1050, 1024), (2000, 1088)):
        limit_files(room)
        if room == 20:
            with pytest.raises(OSError, match="too large"):
                run.write_json("recipe.json", {"name": "cut in the middle of it"})
        parked = ParkedPrefix(layer.parameters)
        for _ in range(8):
            parked.settle(needed=False)
        assert parked.parked_bytes == parked_bytes
        parked.bring_back()
        assert all(map(torch.equal, layer.parameters(), before))
    assert run.read_recipe() == {"name": "whole"}


def test_what_is_written_beside_the_run_is_whole_or_as_it_was(tmp_path: Path) -> None:
    run_distributed(_writes_notes_and_parks, tmp_path, world_size=1)


def _loses_events(path: Path) -> None:
    recorder = Recorder(path)
    recorder.event("step", step=1)
    limit_files(path.stat().st_size + 10)
    recorder.event("step", step=2)
    limit_files(resource.RLIM_INFINITY)
    recorder.event("step", step=3)
    recorder.close()


def test_events_that_do_not_fit_are_lost_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    run_distributed(_loses_events, path, world_size=1)
    assert [event["step"] for event in read_events(path)] == [1, 3]


class _FullTracker:
    """Shows one event; its disk is full then."""

    def __init__(self) -> None:
        self.shown: list[int] = []

    def event(self, event: Mapping[str, Any]) -> None:
        if self.shown:
            raise OSError(errno.ENOSPC, "no space left on device")
        self.shown.append(event["step"])

    def close(self, *, failed: bool = False) -> None:
        del failed
        raise OSError(errno.ENOSPC, "no space left on device")


def test_a_tracker_that_fails_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    fails, early = _FullTracker(), _FullTracker()
    recorder = Recorder(path, trackers=[fails, early])
    for step in (1, 2, 3):
        recorder.event("step", step=step)
    recorder.close()
    assert fails.shown == early.shown == [1]
    assert [event["step"] for event in read_events(path)] == [1, 2, 3]
    assert caplog.text.count("_FullTracker has failed and is left out") == 2
    Recorder(path, trackers=[_FullTracker()]).close()


def _fails_while_a_save_is_committed(recipe: Path) -> None:
    from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
    from dist_ft.train import saving
    from dist_ft.train.run_lock import RunLock

    done: list[str] = []
    begun = threading.Event()
    commit = saving.commit

    def slowly(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        time.sleep(0.5)
        problem = commit(*args, **kwargs)
        done.append("committed")
        return problem

    def fail(call: int) -> None:
        if begun.is_set():
            raise RuntimeError(f"a bug in call {call}")
        time.sleep(0.05)  # a save takes longer than such a step

    saving.commit = slowly
    before(RunLock, "release", lambda _: done.append("released"))
    before(DeepSpeedEngine, "train_step", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        build.train(load_recipe(recipe), resume=False)
    assert done == ["committed", "released"]


def test_a_run_that_fails_keeps_its_folder_until_it_writes_no_more(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, checkpoint={"every": "3step"})
    run_distributed(_fails_while_a_save_is_committed, recipe, world_size=1)
    assert newest_checkpoint(tmp_path / "runs/tiny")
