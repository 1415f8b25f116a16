"""`dist-ft search --over`, with and without `--rounds`, on real runs: small ones, but whole."""

from __future__ import annotations

import csv
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers.models.bert.modeling_bert import BertLayer

from dist_ft.config import Recipe
from dist_ft.freezing.activation_cache import ActivationCache
from dist_ft.recipe import load_recipe
from dist_ft.search import session
from dist_ft.search.population import tune_population
from dist_ft.search.tune import TuneOptions, tune
from dist_ft.train import run_lock
from dist_ft.train.ending import PREEMPTED
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny_run import events, state_hash, terminate_after, train, write_recipe

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


def _rank_tunes_with_a_cache(path: Path) -> None:
    def load(overrides: Sequence[str]) -> Recipe:
        return load_recipe(path, overrides=overrides)

    opened: list[Path] = []
    open_cache = ActivationCache.open

    def watched(self: ActivationCache, *args: Any, **kwargs: Any) -> int:
        opened.append(self.folder)
        return open_cache(self, *args, **kwargs)

    ActivationCache.open = watched
    assert tune(load, options=CACHED, resume=False).exit_code == 0
    # The candidates' caches were there, and on a disk of their own if the recipe says so.
    elsewhere = load(()).cache.dir
    assert len(set(opened)) == 4
    assert all((elsewhere or path.parent / "runs") in folder.parents for folder in opened)


CACHED = TuneOptions(("optim.lr=choice:1e-3|2e-3|1e25",), trials=4, budget=0.75)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_search_leaves_no_candidates_cache(elsewhere: bool, tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path,
        tasks=[TASK],
        checkpoint={},
        train={"max_duration": "8step"},
        optim={"schedule": {"type": "constant", "warmup": "0step"}},
        cache={"policy": "on", **({"dir": "disk"} if elsewhere else {})},
    )
    recipe = yaml.safe_load(path.read_text())
    recipe["freezing"] = {"policy": "static", "depth": 2}
    path.write_text(yaml.safe_dump(recipe))
    run_distributed(_rank_tunes_with_a_cache, path)
    assert list(tmp_path.rglob("step-*"))
    assert not list(tmp_path.rglob("*.data"))
    assert not list(tmp_path.rglob("cache/*"))


def _rank_tunes_by_scores(path: Path) -> None:
    def load(overrides: Sequence[str]) -> Recipe:
        return load_recipe(path, overrides=overrides)

    # Compared after 12 steps, where the recipe has no evaluation.
    options = TuneOptions(("optim.lr=choice:1e-2",), trials=2, budget=0.75)
    assert tune(load, options=options, resume=False).exit_code == 0


def test_candidates_train_what_the_recipe_does_where_scores_decide_it(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path,
        checkpoint={},
        evaluation={"every": "5step", "early_stopping": {"patience": 1}},
        mixture={"policy": "bandit", "every": 8, "reward": "gain", "rate": 4.0, "smoothing": 0.0},
    )
    recipe = yaml.safe_load(path.read_text())
    recipe["freezing"] = {"policy": "plateau", "first": 1, "patience": 1, "min_delta": 0.5}
    path.write_text(yaml.safe_dump(recipe))
    run_distributed(_rank_tunes_by_scores, path)
    folder = tmp_path / "runs/tiny-search"
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert [r["steps"] for r in rows] == ["24", "12"]
    winner = folder / f"runs/trial-{'000' if rows[0]['values'] == 'the recipe itself' else '001'}"

    train(folder / "recipe.yaml", ["evaluation.early_stopping=null"])
    whole = tmp_path / "runs/tiny-chosen"
    for kind in ("mixture", "phase"):
        one, other = (
            [{k: v for k, v in e.items() if k in ("step", "shares", "trainable_groups")}
             for e in events(run) if e["event"] == kind]
            for run in (winner, whole)
        )  # fmt: skip
        assert one == other
        assert len(one) > 1
    assert state_hash(winner) == state_hash(whole)


DIVERGING = TuneOptions(("optim.lr=choice:1e-3|1e25",), trials=3, budget=0.75)


def _rank_tunes_with_faults(path: Path) -> None:
    """Search where another search writes, then where a rate diverges and rank 1 lacks memory."""

    def load(overrides: Sequence[str]) -> Recipe:
        return load_recipe(path, overrides=overrides)

    session.dist.shut_down = lambda: None  # the ranks stay together for the second search
    run_lock._PATIENCE_S = 0.0
    rank = os.environ["RANK"]
    other = run_lock.RunLock(path.parent / "runs/tiny-search")
    if rank == "0":
        other.acquire()
    with pytest.raises(ValueError, match="is being written by another run"):
        tune(load, options=DIVERGING, resume=False)
    other.release()

    layer: Any = BertLayer
    forward = layer.forward

    def fill(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        tokens = hidden.shape[0] * hidden.shape[1]  # two rows are no more than this
        if rank == "1" and self.training and torch.is_grad_enabled() and tokens > 30:
            raise torch.OutOfMemoryError("fake allocator: no room for 2.00 GiB")
        return forward(self, hidden, *args, **kwargs)

    layer.forward = fill
    assert tune(load, options=DIVERGING, resume=False).exit_code == 0


def test_a_search_outlives_a_run_that_diverges_and_one_that_lacks_memory(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path,
        tasks=[TASK],
        checkpoint={},
        train={"max_duration": "8step"},
        optim={"lr": 1e-3, "schedule": {"type": "constant", "warmup": "0step"}},
    )
    recipe = yaml.safe_load(path.read_text())
    recipe["freezing"] = {"policy": "none"}
    recipe["optim"].pop("head_lr")
    path.write_text(yaml.safe_dump(recipe))
    run_distributed(_rank_tunes_with_faults, path)
    folder = tmp_path / "runs/tiny-search"
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert [(r["values"] == "optim.lr=1e25", r["score"] == "nan", r["steps"]) for r in rows] == [
        (False, False, "8"), (False, False, "4"), (True, True, "4"),
    ]  # fmt: skip
    for run in (folder / "runs").iterdir():
        found = events(run)
        refused = [e for e in found if e["event"] == "bad_numbers"]
        assert bool(refused) == (found[-1]["event"] not in ("segment", "end"))
        # Each comes down to two rows once, and stays there when it goes on.
        assert [e["micro_batch_size"] for e in found if e["event"] == "out_of_memory"] == [2]


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
