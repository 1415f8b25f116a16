"""`dist-ft search` on real runs: small ones, but whole."""

from __future__ import annotations

import csv
import gc
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dist_ft import dist
from dist_ft.recipe import load_recipe
from dist_ft.search.run import SearchOptions, search
from dist_ft.train.segment import Place, train_until
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny_run import (
    events,
    newest_checkpoint,
    state_hash,
    terminate_after,
    train,
    write_model,
)
from tests.helpers.tiny_run import write_recipe as write_tiny_recipe

TASK = {
    "name": "tags",
    "type": "token_classification",
    "data": {"train": "tagged.jsonl", "validation": 0.3},
    "max_length": 32,
}


def write_recipe(folder: Path) -> Path:
    """A model of three blocks: seven candidates, twelve segments."""
    recipe = write_tiny_recipe(folder, tasks=[TASK], checkpoint={"every": "100step"})
    write_model(folder / "model", layers=3)
    return recipe


def run_search(
    recipe: Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    stop_after: int | None = None,
    exit_code: int = 0,
) -> None:
    run_distributed(_rank_searches, recipe, tuple(overrides), resume, stop_after, exit_code)


def _rank_searches(
    path: Path, overrides: Sequence[str], resume: bool, stop_after: int | None, exit_code: int
) -> None:
    recipe = load_recipe(path, overrides=overrides)
    rank = os.environ["RANK"]
    if stop_after is not None and rank == "1":
        journal = recipe.output_dir / f"{recipe.name}-search" / "study.journal"
        threading.Thread(target=terminate_after, args=(journal, stop_after), daemon=True).start()
    outcome = search(recipe, options=SearchOptions(), resume=resume)
    assert outcome.exit_code == exit_code
    assert (outcome.table is not None) == (rank == "0" and exit_code == 0)


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_the_chosen_recipe_trains_the_winner_and_a_stopped_search_finds_the_same(
    tmp_path: Path,
) -> None:
    recipe = write_recipe(tmp_path)
    run_search(recipe, ["name=whole"])
    folder = tmp_path / "runs/whole-search"
    rows = table(folder)
    assert len(rows) == 7
    assert [r["steps"] for r in rows] == ["24", "6", "6", "3", "3", "3", "3"]
    # Only the winner's state is kept, and its segments make up one run.
    winner = folder / f"runs/blocks-{int(rows[0]['lo']):02d}-{int(rows[0]['hi']):02d}"
    kept = [p.parent.parent for p in folder.glob("runs/*/checkpoints/step-*")]
    assert kept == [winner]
    resumed = [e["step"] for e in events(winner) if e["event"] == "resume" and e["path"]]
    assert resumed == [3, 6, 12]

    train(folder / "recipe.yaml")
    chosen = tmp_path / "runs/whole-chosen"
    assert newest_checkpoint(chosen).name == "step-00000024"
    assert state_hash(chosen) == state_hash(winner)

    run_search(recipe, ["name=stopped"], stop_after=5, exit_code=75)
    assert not (tmp_path / "runs/stopped-search/table.csv").exists()
    run_search(recipe, ["name=stopped"], resume=True)
    assert table(tmp_path / "runs/stopped-search") == rows


@pytest.mark.slow
def test_a_search_that_is_there_is_not_mixed_with_another(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run_search(recipe, stop_after=1, exit_code=75)
    with pytest.raises(Exception, match="go on with it by --resume"):
        run_search(recipe)
    with pytest.raises(Exception, match=r"optim\.lr \(was 0\.001, is 0\.5\)"):
        run_search(recipe, ["optim.lr=0.5"], resume=True)


def test_a_segment_is_scored_by_what_the_recipe_decides_by(tmp_path: Path) -> None:
    recipe = write_tiny_recipe(tmp_path, evaluation={"decide_by": "worst"})
    run_distributed(_rank_is_scored, recipe, world_size=1)


def _rank_is_scored(path: Path) -> None:
    recipe = load_recipe(path)
    world = dist.world_from_environment()
    device = dist.init_process_group(world, timeout_s=60, join_timeout_s=60)
    segment = train_until(recipe, step=3, place=Place(world, device))
    found = segment.metrics
    each = (found["text"]["accuracy"], found["tags"]["f1"], found["spans"]["f1"])
    assert min(each) < max(each)
    assert segment.score == min(each)


@pytest.mark.parametrize("stage", [2, 3])
def test_segments_leave_no_weights_behind(tmp_path: Path, stage: int) -> None:
    recipe = write_recipe(tmp_path)
    run_distributed(_rank_counts_weights, recipe, stage, world_size=1)


def _rank_counts_weights(path: Path, stage: int) -> None:
    recipe = load_recipe(path, overrides=[f"engine.zero_stage={stage}"])
    world = dist.world_from_environment()
    device = dist.init_process_group(world, timeout_s=60, join_timeout_s=60)
    alive = []
    for step in (3, 6, 9):
        train_until(recipe, step=step, place=Place(world, device))
        gc.collect()
        weights = [o for o in gc.get_objects() if isinstance(o, torch.nn.Parameter)]
        alive.append(sum(p.numel() + getattr(p, "ds_numel", 0) for p in weights))
    assert alive[1:] == [alive[0]] * 2
