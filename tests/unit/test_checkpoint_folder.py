"""What becomes of checkpoint folders where a disk fails or a file is damaged."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_ft.engine.base import EngineState, StateSlice
from dist_ft.train import checkpoint
from dist_ft.train.checkpoint import (
    CheckpointError,
    commit,
    find_checkpoint,
    set_aside,
    write_rank_file,
)
from dist_ft.train.saving import save_checkpoint


def _save(root: Path, value: float) -> Path:
    state = EngineState([StateSlice("p", 0, {"weight": torch.full((3,), value)})], {}, ())
    return save_checkpoint(root, step=1, state=state, trainer={}).path


@pytest.mark.parametrize("replaces", [False, True])
def test_a_name_that_may_not_last_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaces: bool
) -> None:
    before = _save(tmp_path, 1.0) if replaces else None
    kept = {} if before is None else {p.name: p.read_bytes() for p in before.iterdir()}
    fsync = checkpoint._fsync

    def fail(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, "the disk is gone")
        fsync(path)

    monkeypatch.setattr(checkpoint, "_fsync", fail)
    with pytest.raises(CheckpointError, match=r"was not written .*the disk is gone"):
        _save(tmp_path, 2.0)
    assert find_checkpoint(tmp_path) == (before, [])
    assert list(tmp_path.iterdir()) == ([] if before is None else [before])
    assert before is None or kept == {p.name: p.read_bytes() for p in before.iterdir()}


def test_what_is_set_aside_twice_under_one_name_is_there_twice(tmp_path: Path) -> None:
    for value in (1.0, 2.0, 3.0):
        set_aside(tmp_path, [_save(tmp_path, value).name])
    aside = sorted(tmp_path.iterdir())
    assert [p.name for p in aside] == [f".damaged-step-00000001{end}" for end in ("", ".1", ".2")]
    assert len({(p / "rank-00000.safetensors").read_bytes() for p in aside}) == 3


def test_a_rank_file_that_was_cut_makes_no_checkpoint(tmp_path: Path) -> None:
    aside, final = tmp_path / ".tmp-step-00000001", tmp_path / "step-00000001"
    entry, problem = write_rank_file(aside, rank=0, tensors={"weight|p|0": torch.ones(3)})
    assert problem is None
    size = entry["bytes"]
    os.truncate(aside / entry["file"], size - 1)
    found = commit(aside, final, step=1, trainer={}, files=[entry])
    assert f"rank-00000.safetensors has {size - 1} bytes, expected {size}" in str(found)
    assert not final.exists()


def test_a_checkpoint_on_a_disk_that_fails_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = EngineState([StateSlice("p", 0, {"weight": torch.ones(3)})], {}, ())
    older, newer = (
        save_checkpoint(tmp_path, step=step, state=state, trainer={}).path for step in (1, 2)
    )
    fingerprint = checkpoint._fingerprint

    def fail(path: Path) -> Any:
        if path.parent == newer:
            raise OSError(errno.EIO, "Input/output error")
        return fingerprint(path)

    monkeypatch.setattr(checkpoint, "_fingerprint", fail)
    found, passed_over = find_checkpoint(tmp_path)
    assert found == older
    assert len(passed_over) == 1
    assert "it cannot be read" in passed_over[0]
