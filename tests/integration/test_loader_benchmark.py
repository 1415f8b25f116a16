"""What `benchmarks/loader.py` counts is right; its timings are its own business."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.loader import claims_of, table_of, useful_shares
from benchmarks.loading.data import text_lengths
from benchmarks.loading.loaders import OURS
from benchmarks.loading.rounds import Cost, in_rounds


def burn(seconds: float) -> Iterator[Any]:
    while True:
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass
        yield {"labels": [0, 0]}


def missing() -> Iterator[Any]:
    raise ModuleNotFoundError("no such package")


def test_a_loader_is_charged_its_own_cpu_time() -> None:
    loaders = {"busy": lambda: burn(0.004), "idle": lambda: itertools.repeat({"labels": [0] * 9})}
    costs, left_out = in_rounds({**loaders, "absent": missing}, rounds=2, batches=20)
    assert left_out == {"absent": "no such package"}
    assert [len(rounds) for rounds in costs.values()] == [2, 2]
    for busy, idle in zip(costs["busy"], costs["idle"], strict=True):
        # 4 ms for two samples.
        assert 0.0019 < busy.cpu_s < 0.004
        assert idle.cpu_s < 1e-5


def test_a_loader_that_fails_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="process of a loader died"):
        in_rounds({"broken": lambda: iter([])}, rounds=1, batches=1)


def test_ratios_are_of_the_same_round() -> None:
    costs = {OURS: [Cost(1.0, 1.0), Cost(4.0, 1.0), Cost(2.0, 1.0)]}
    costs["mosaicml-streaming"] = [Cost(12.0, 1.0), Cost(44.0, 1.0), Cost(22.0, 1.0)]
    rows = table_of(costs)
    assert [row["times_ours"] for row in rows] == [1, 11]
    assert rows[1]["times_ours_least"] == 11
    shares = useful_shares(text_lengths(40 * 256))
    claims = claims_of(rows, shares=shares, times={"dist_ft (slowest of 3)": 0.01})
    assert [c.name for c in claims if not c.holds] == []
    # A bin is never over-full, and more rows to choose from fill bins better.
    within, over = (shares[name] for name in shares if name.startswith("bins"))
    assert 0.9 < within < over <= 1
