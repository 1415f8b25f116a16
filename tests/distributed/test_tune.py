"""`dist-ft search --over`, with and without `--rounds`, on real runs: small ones, but whole."""

from __future__ import annotations

import csv
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from dist_ft.config import Recipe
from dist_ft.recipe import load_recipe
from dist_ft.search.population import tune_population
from dist_ft.search.tune import TuneOptions, tune
from dist_ft.train.build import PREEMPTED
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny_run import events, state_hash, terminate_after, write_recipe

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


OVER = ("optim.lr=log:1e-6:1e-2",)


def _rank_evolves(path: Path, name: str, resume: bool, stop_after: int | None) -> None:
    def load(overrides: Sequence[str]) -> Recipe:
        return load_recipe(path, overrides=[f"name={name}", *overrides])

    if stop_after is not None and os.environ["RANK"] == "1":
        journal = path.parent / "runs" / f"{name}-search" / "study.journal"
        threading.Thread(target=terminate_after, args=(journal, stop_after), daemon=True).start()
    outcome = tune_population(load, over=OVER, count=3, rounds=2, resume=resume)
    assert outcome.exit_code == (0 if stop_after is None else PREEMPTED)


def test_the_worst_goes_on_from_the_best_also_after_a_stop(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path, tasks=[TASK], checkpoint={}, train={"max_duration": "8step"}, optim={"lr": 1e-3}
    )
    run_distributed(_rank_evolves, path, "whole", False, None)
    folder = tmp_path / "runs" / "whole-search"
    table = (folder / "table.csv").read_text()
    rows = {int(r["member"]): r for r in csv.DictReader(table.splitlines())}
    [(child, row)] = [(n, r) for n, r in rows.items() if r["parent"]]
    parent = rows[int(row["parent"])]
    assert (row["from_step"], row["to_step"]) == ("4", "8")
    assert sorted(r["to_step"] for r in rows.values()) == ["4", "8", "8", "8"]
    lr, before = float(row["optim.lr"]), float(parent["optim.lr"])
    assert lr == pytest.approx(before * 0.8, rel=1e-3) or lr == pytest.approx(
        min(1e-2, before * 1.2), rel=1e-3
    )
    run = folder / "runs" / f"member-{child:03d}"
    [resumed] = [e for e in events(run) if e["event"] == "resume"]
    assert resumed["step"] == 4
    trained = json.loads((run / "recipe.json").read_text())
    assert trained["optim"]["lr"] == lr

    run_distributed(_rank_evolves, path, "halves", False, 4)
    run_distributed(_rank_evolves, path, "halves", True, None)
    again = tmp_path / "runs" / "halves-search"
    assert (again / "table.csv").read_text() == table
    for number in rows:
        if rows[number]["to_step"] == "8":
            one, other = (f / "runs" / f"member-{number:03d}" for f in (folder, again))
            assert state_hash(one) == state_hash(other)
