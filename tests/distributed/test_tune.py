"""`dist-ft search --over` on real runs: small ones, but whole."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from dist_ft.config import Recipe
from dist_ft.recipe import load_recipe
from dist_ft.search.tune import TuneOptions, tune
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny_run import events, write_recipe

OPTIONS = TuneOptions(
    ("optim.lr=log:1e-6:1e-2", "regularization.label_smoothing=choice:null|0.1"),
    trials=4,
    budget=0.75,
)
TASK = {
    "name": "tags",
    "type": "token_classification",
    "data": {"train": "tagged.jsonl", "validation": 0.3},
    "max_length": 32,
}


def _rank_tunes(path: Path, resume: bool) -> None:
    def load(overrides: Sequence[str]) -> Recipe:
        return load_recipe(path, overrides=overrides)

    assert tune(load, options=OPTIONS, resume=resume).exit_code == 0


def test_the_best_values_win_and_the_log_has_it_all(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path, tasks=[TASK], checkpoint={}, train={"max_duration": "8step"}, optim={"lr": 1e-3}
    )
    run_distributed(_rank_tunes, path, False)
    folder = tmp_path / "runs" / "tiny-search"
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert len(rows) == 4
    assert {r["values"] for r in rows} >= {"the recipe itself"}
    steps = [int(r["steps"]) for r in rows]
    assert steps == [8, 8, 4, 4]
    finals = [(-float(r["score"]), float(r["loss"])) for r in rows[:2]]
    assert finals == sorted(finals)
    chosen = load_recipe(folder / "recipe.yaml")
    searched = json.loads((folder / "search.json").read_text())["search"]
    assert searched["over"] == list(OPTIONS.over)
    expected = {} if rows[0]["values"] == "the recipe itself" else dict(
        part.split("=") for part in rows[0]["values"].split()
    )  # fmt: skip
    assert chosen.optim.lr == float(expected.get("optim.lr", 1e-3))
    before = (folder / "table.csv").read_text()
    counts = {run: len(events(run)) for run in (folder / "runs").iterdir()}
    assert len(counts) == 4
    # From the log alone: nothing is trained again.
    run_distributed(_rank_tunes, path, True)
    assert (folder / "table.csv").read_text() == before
    assert counts == {run: len(events(run)) for run in (folder / "runs").iterdir()}
