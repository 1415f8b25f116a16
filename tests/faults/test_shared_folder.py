"""Ranks whose run folders or data are not the same: told at the start, and never called saved."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from dist_ft import dist
from dist_ft.config import Recipe
from dist_ft.engine.base import EngineState, StateSlice
from dist_ft.recipe import load_recipe
from dist_ft.train import build, shared_folder
from dist_ft.train.checkpoint import CheckpointError, find_checkpoint
from dist_ft.train.retention import Retention
from dist_ft.train.saving import save_checkpoint
from dist_ft.train.segment import Place, train_until
from dist_ft.train.shared_folder import check_shared
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny_run import events, train, write_recipe


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


def _with_data_of_its_own(path: Path) -> Recipe:
    """Return the recipe as rank 1 has it whose node has other raw files, changed in one row."""
    if os.environ["RANK"] == "0":
        return load_recipe(path)
    own = path.parent / "node1"
    own.mkdir()
    for file in path.parent.glob("*.jsonl"):
        shutil.copy(file, own)
    lines = (own / "texts.jsonl").read_text().splitlines(keepends=True)
    lines[0] = lines[0].replace('"text": "', '"text": "love ')
    (own / "texts.jsonl").write_text("".join(lines))
    recipe = load_recipe(path)
    (task, *tasks) = recipe.tasks
    train_source = task.data.train.model_copy(update={"path": str(own / "texts.jsonl")})
    data = task.data.model_copy(update={"train": train_source})
    tasks = [task.model_copy(update={"data": data}), *tasks]
    return recipe.model_copy(update={"tasks": tasks, "data_dir": own / "data"})


def _start(recipe: Recipe, run: str, *, resume: bool) -> None:
    if run == "run":
        build.train(recipe, resume=resume)
    else:
        place = Place(dist.world_from_environment(), torch.device("cpu"))
        train_until(recipe, step=4, place=place)


def _is_refused(recipe: Recipe, run: str, *, resume: bool) -> None:
    with pytest.raises(ValueError, match=r"data_dir: not all ranks have the rows") as caught:
        _start(recipe, run, resume=resume)
    text = str(caught.value)
    assert "that rank 0 on" in text
    assert "rank 1 on" in text
    assert "text/" in text
    assert "tags/" not in text
    assert "spans/" not in text
    (recipe.output_dir.parent / f"rank{os.environ['RANK']}").write_text(text)


def _with_other_rows(path: Path, run: str, resume: bool) -> None:
    _is_refused(_with_data_of_its_own(path), run, resume=resume)


@pytest.mark.parametrize("run", ["run", "segment"])
@pytest.mark.parametrize("resume", [False, True], ids=["fresh", "resumed"])
def test_ranks_with_other_rows_are_refused_before_a_step(
    tmp_path: Path, run: str, resume: bool
) -> None:
    path = write_recipe(tmp_path)
    if resume:
        train(path, stop_at=1, exit_code=75)
    before = len(events(tmp_path / "runs/tiny")) if resume else 0
    run_distributed(_with_other_rows, path, run, resume)
    told = [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)]
    assert told[0] == told[1]
    metrics = tmp_path / "runs/tiny/metrics.jsonl"
    assert (len(events(metrics.parent)) if metrics.exists() else 0) == before
