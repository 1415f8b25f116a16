"""Ranks whose run folders are not the same one: told at the start, and never called saved."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dist_ft.engine.base import EngineState, StateSlice
from dist_ft.recipe import load_recipe
from dist_ft.train import build, shared_folder
from dist_ft.train.checkpoint import CheckpointError, find_checkpoint
from dist_ft.train.retention import Retention
from dist_ft.train.saving import save_checkpoint
from dist_ft.train.shared_folder import check_shared
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny_run import write_recipe


def _on_disks_of_their_own(path: Path) -> None:
    shared_folder._PATIENCE_S = 0.0
    rank = int(os.environ["RANK"])
    shared, own = path.parent / "shared", path.parent / f"node{rank}"
    for folder in (shared, own):
        folder.mkdir(exist_ok=True)
    check_shared(shared)
    assert rank or not list(shared.iterdir())

    # Even where nobody looked: what rank 0 does not see is not saved, and costs no older one.
    state = EngineState([StateSlice(f"p{rank}", 0, {"weight": torch.ones(3)})], {}, ())
    keep = Retention(keep_last=1)
    good = save_checkpoint(shared, step=1, state=state, trainer={}, retention=keep).path
    elsewhere = shared if rank == 0 else own
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors is missing; is .* same"):
        save_checkpoint(elsewhere, step=2, state=state, trainer={}, retention=keep)
    assert find_checkpoint(shared) == (good, [])

    # The ranks leave their group with this, before any step.
    recipe = load_recipe(path).model_copy(update={"output_dir": own / "runs"})
    with pytest.raises(ValueError, match=r"output_dir: .* not one folder .*: rank 1 on") as caught:
        build.train(recipe, resume=False)
    assert "rank 0 on" in str(caught.value)
    assert not list(own.glob("runs/*/*.json"))


def test_folders_of_the_nodes_own_are_refused_at_the_start_and_never_called_saved(
    tmp_path: Path,
) -> None:
    run_distributed(_on_disks_of_their_own, write_recipe(tmp_path))
