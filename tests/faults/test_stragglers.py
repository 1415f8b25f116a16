"""A rank that all others wait for is named."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from dist_ft.engine.loss_module import LossModule
from dist_ft.train.console import Console
from dist_ft.train.recorder import Recorder, read_events
from dist_ft.train.stragglers import SlowRanks
from tests.helpers.supervised import before, supervise
from tests.helpers.tiny_run import events, write_recipe


def _sleeps(attempt: int, rank: int) -> None:
    del attempt
    if rank == 1:
        before(LossModule, "forward", lambda call: time.sleep(0.5) if call > 6 else None)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_sleeping_rank_is_named(tmp_path: Path, stage: int) -> None:
    recipe = write_recipe(
        tmp_path,
        train={"max_duration": "9step"},
        engine={"zero_stage": stage},
        evaluation={"every": None},
        logging={"every": 1},
        supervision={"straggler_factor": 3},
    )
    assert supervise(recipe, ["freezing={policy: none}"], fault=_sleeps).code == 0
    (told,) = [e for e in events(tmp_path / "runs/tiny") if e["event"] == "straggler"]
    assert (told["rank"], told["intervals"]) == (1, 3)
    assert told["own_s"] > 3 * told["median_own_s"]


def test_one_slow_interval_is_no_straggler_and_one_that_goes_on_is_told_once(
    tmp_path: Path,
) -> None:
    recorder = Recorder(tmp_path / "metrics.jsonl")
    slow = SlowRanks(recorder, Console(main=False), factor=1.5, intervals=3)
    usual, behind = [1.0, 1.1, 0.9, 1.0], [1.0, 1.1, 2.0, 1.0]
    series: list[Any] = [behind, behind, usual, *[behind] * 5, usual, *[behind] * 3]
    for step, seconds in enumerate(series):
        slow.see(step, seconds)
    recorder.close()
    told = list(read_events(tmp_path / "metrics.jsonl"))
    assert [(e["step"], e["rank"]) for e in told] == [(5, 2), (11, 2)]
    assert told[0]["lost_s"] == pytest.approx(3.0)
