"""Which checkpoint a run goes on from, and what it must not start over for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_ft.engine.base import EngineState, StateSlice
from dist_ft.train import restoring
from dist_ft.train.callbacks import Checkpoint
from dist_ft.train.checkpoint import CheckpointError
from dist_ft.train.console import Console
from dist_ft.train.loop import Progress
from dist_ft.train.recorder import Recorder
from dist_ft.train.run_folder import RunFolder
from dist_ft.train.saving import save_checkpoint
from tests.helpers.manifests import write_as_another_version

CONSOLE = Console(main=False, every=1)


@pytest.mark.parametrize("why", ["another version", "damaged"])
def test_a_run_with_checkpoints_that_can_not_be_read_does_not_start_over(
    why: str, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    state = EngineState([StateSlice("p", 0, {"weight": torch.ones(3)})], {}, ())
    for step in (2, 4):
        checkpoint = save_checkpoint(folder.checkpoints, step=step, state=state, trainer={}).path
        if why == "damaged":
            (checkpoint / "rank-00000.safetensors").unlink()
        else:
            write_as_another_version(checkpoint)
    names = sorted(p.name for p in folder.checkpoints.iterdir())
    run: Any = None
    expected = "this version of dist_ft reads" if why == "another version" else "no whole checkp"
    with pytest.raises(CheckpointError, match=expected):
        restoring.restore(run, folder=folder, recorder=Recorder(None), console=CONSOLE)
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == names == [
        "step-00000002", "step-00000004",
    ]  # fmt: skip


def _saves(
    refused: set[int], due: set[int], *, every: int | None = 4, keep_every: int | None = None
) -> list[tuple[int, bool]]:
    """Return step and ephemeral of what 12 steps save: every 4 steps, every 2 in between."""
    about: list[tuple[int, bool]] = []
    writer: Any = SimpleNamespace(
        poll=lambda: None,
        begin=lambda step, state, trainer: about.append((step, trainer["ephemeral"])),  # noqa: ARG005
    )
    checkpoint = Checkpoint(
        Recorder(None), CONSOLE, writer, every=every, keep_every=keep_every, ephemeral_every=2,
        in_background=True, describe=dict, scores=lambda _step: {},
    )  # fmt: skip
    run: Any = SimpleNamespace(
        progress=Progress(),
        engine=SimpleNamespace(state=lambda: None),
        beat=lambda _section: None,
        state_dict=dict,
    )
    nothing: Any = None
    for step in range(1, 13):
        run.progress.step = step
        run.progress.refused = run.progress.refused + 1 if step in refused else 0
        checkpoint.is_due = step in due
        checkpoint.on_step_end(run, nothing, nothing)
    return about


def test_no_interval_saves_weights_that_are_in_doubt_and_none_is_forgotten() -> None:
    assert _saves(set(), set()) == [
        (2, True), (4, False), (6, True), (8, False), (10, True), (12, False),
    ]  # fmt: skip
    # Of step 4, a regular one comes after the next good step; the one of step 10 is not missed.
    assert _saves({3, 4, 10}, set()) == [
        (2, True), (5, False), (6, True), (8, False), (12, False),
    ]  # fmt: skip
    # What is due in any case is saved: the best score so far, say.
    assert _saves({3, 4, 5}, {5}) == [
        (2, True), (5, False), (6, True), (8, False), (10, True), (12, False),
    ]  # fmt: skip


def test_what_stays_for_good_is_saved_though_no_other_interval_ends_there() -> None:
    regular = [step for step, ephemeral in _saves(set(), set(), keep_every=5) if not ephemeral]
    assert regular == [4, 5, 8, 10, 12]
    regular = [s for s, short in _saves(set(), set(), every=None, keep_every=5) if not short]
    assert regular == [5, 10]


def test_a_run_goes_back_behind_what_did_not_help() -> None:
    undoubted = restoring._undoubted
    assert undoubted(Progress(step=12, refused=3)) == [9]
    assert undoubted(Progress(step=30, refused=3, dropped=[[8, 12]])) == [27]
    # Not one good step since: not to step 8 again, unless there is nothing before.
    assert undoubted(Progress(step=15, refused=3, dropped=[[8, 12]])) == [7, 12]


def test_the_remedy_for_bad_numbers_may_be_taken_on_resume(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    recipe: dict[str, Any] = {
        "freezing": {"policy": "none"},
        "optim": {"lr": 0.1},
        "train": {"on_bad_numbers": {"max_roll_backs": 2}},
    }
    folder.start(recipe, resume=False)
    folder.check({**recipe, "train": {"on_bad_numbers": {"max_roll_backs": 9}}}, resume=True)
    with pytest.raises(ValueError, match=r"optim\.lr"):
        folder.check({**recipe, "optim": {"lr": 0.01}}, resume=True)
