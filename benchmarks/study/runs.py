"""Trains the runs of the study one after another; what is done is not done again."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import say
from benchmarks.study.data import SETS, failed
from benchmarks.study.strategies import MULTI, make_recipe


@dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
        part: ``small`` or ``full``.
        strategy: Its name.
        sets: The sets that it trains on.
        seed: Its seed.
    """

    part: str
    strategy: str
    sets: tuple[str, ...]
    seed: int


def plans(
    part: str, *, strategies: Sequence[str], sets: Sequence[str], seeds: int
) -> Iterator[Plan]:
    """Yield the runs seed by seed, so that a part that is cut short compares all strategies."""
    for seed in range(seeds):
        for strategy in strategies:
            if strategy in MULTI:
                yield Plan(part, strategy, tuple(sets), seed)
                continue
            for name in sets:
                yield Plan(part, strategy, (name,), seed)


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of results; a line that was cut short is left out."""
    if not path.exists():
        return []
    found: list[dict[str, Any]] = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def run_all(todo: Sequence[Plan], *, results: Path, folder: Path) -> None:
    """Train what has no line in `results` yet, and add a line for each set of every run."""
    done = {(r["part"], r["strategy"], r["set"], r["seed"]) for r in read_results(results)}
    for number, plan in enumerate(todo, start=1):
        if all((plan.part, plan.strategy, name, plan.seed) in done for name in plan.sets):
            continue
        began = time.monotonic()
        rows = _train(plan, folder=folder)
        with results.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        shown = ", ".join(f"{r['set']} {r['score']:.3f}" for r in rows if r["score"] is not None)
        say(
            f"{number}/{len(todo)} {plan.part}, {plan.strategy}, seed {plan.seed}: "
            f"{shown or 'did not finish'} ({time.monotonic() - began:.0f} s)"
        )


def _train(plan: Plan, *, folder: Path) -> list[dict[str, Any]]:
    """Return what `_train_here` does in a process of its own.

    DeepSpeed keeps the process group of its first run, so a process trains once. A fork of this
    one has imported everything already.
    """
    importlib.import_module("dist_ft.train.build")  # once, for the forks

    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=lambda: send.send(_train_here(plan, folder=folder)))
    process.start()
    send.close()
    try:
        rows = receive.recv()
    except EOFError:
        rows = []
    process.join()
    if process.exitcode == 1:
        raise SystemExit(f"{plan.strategy} was stopped: start the same command again to go on")
    return rows or _failures(plan, f"the process ended with {process.exitcode}")


def _failures(plan: Plan, problem: str) -> list[dict[str, Any]]:
    about = {k: v for k, v in asdict(plan).items() if k != "sets"}
    return [
        {**about, "set": name, "score": None, "failed": True, "problem": problem[-2000:]}
        for name in plan.sets
    ]


def _train_here(plan: Plan, *, folder: Path) -> list[dict[str, Any]]:
    """Return a line of results for each set; a run that raised has a score of None and says why."""
    from dist_ft.api import fine_tune
    from dist_ft.engine.heap import keep_freed_memory

    keep_freed_memory()  # as `dist-ft train` does
    shutil.rmtree(folder / "runs", ignore_errors=True)
    recipe = make_recipe(
        plan.strategy, sets=plan.sets, part=plan.part, seed=plan.seed, folder=folder
    )
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    cpu = time.process_time()
    try:
        with _log(folder / "log.txt"):
            run = fine_tune(file)
    # A strategy that breaks is a result, and must not end the study.
    except Exception:  # noqa: BLE001
        return _failures(plan, traceback.format_exc())
    cpu = time.process_time() - cpu
    if run.outcome != "finished":  # asked to stop: that says nothing about the strategy
        raise SystemExit(1)
    scores, train_s = run.scores(), _train_seconds(run.path)
    about = {k: v for k, v in asdict(plan).items() if k != "sets"}
    return [
        {
            **about,
            "set": name,
            "metric": SETS[name].metric,
            "score": scores[name][SETS[name].metric],
            "failed": failed(name, metrics=scores[name]),
            "metrics": scores[name],
            # Of a multi-task run each set has its share, so that sums compare.
            "train_s": train_s / len(plan.sets),
            "cpu_s": cpu / len(plan.sets),
        }
        for name in plan.sets
    ]


def _train_seconds(run: Path) -> float:
    """Return the time from the first step to the last evaluation, start and saving left out."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(e["time_s"] for e in events if e["event"] == "start")
    return max(e["time_s"] for e in events if e["event"] == "eval") - first


@contextmanager
def _log(path: Path) -> Iterator[None]:
    """Send what libraries print, below Python too, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            for descriptor in kept:
                os.close(descriptor)
