"""The benchmarks run, their claims hold, and they would notice if they did not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import claim, markdown_table
from benchmarks.freezing.outcome import last_error, measure

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def freeze_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `--quick --check` wrote; it runs as a file, from another folder, as a user would."""
    folder = tmp_path_factory.mktemp("benchmark")
    script = ROOT / "benchmarks" / "freeze_correctness.py"
    done = subprocess.run(
        [sys.executable, str(script), "--quick", "--check", "--json", "out.json"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "out.json").read_text())


def select(results: dict[str, Any], table: str, system: str, setting: str) -> dict[str, Any]:
    [row] = [
        row
        for row in results["rows"]
        if (row["table"], row["setting"]) == (table, setting) and row["system"].startswith(system)
    ]
    return row


@pytest.mark.slow
def test_the_claims_of_freeze_correctness_hold(freeze_results: dict[str, Any]) -> None:
    assert {"hardware", "versions", "commit", "rows", "claims"} == freeze_results.keys()
    assert len(freeze_results["claims"]) == 5
    for one in freeze_results["claims"]:
        assert one.keys() == {"name", "value", "bound", "direction", "holds"}
        assert one["holds"], one
    own = [row for row in freeze_results["rows"] if row["system"].startswith("dist_ft")]
    assert len(own) == 15
    assert not [row for row in own if row["note"].startswith("died")]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_freeze_correctness_sees_what_raw_deepspeed_does(
    freeze_results: dict[str, Any], stage: int
) -> None:
    after = select(freeze_results, "gradual", "DeepSpeed, toggle, all masks after", f"ZeRO-{stage}")
    assert after["drift"] > 1e-2
    assert after["difference"] > 1e-2
    before = select(freeze_results, "gradual", "DeepSpeed, toggle, first mask", f"ZeRO-{stage}")
    assert before["thawed"] == 0
    assert select(freeze_results, "heads", "DeepSpeed", f"ZeRO-{stage}")["drift"] > 1e-2


@pytest.mark.slow
def test_freeze_correctness_gives_each_peer_a_fair_start(freeze_results: dict[str, Any]) -> None:
    # Where a system can be right it is: only then do its other rows say something.
    for system, setting in (
        ("DeepSpeed, toggle, all masks after", "ZeRO-0"),
        ("torch DDP, all masks after", "find_unused_parameters"),
    ):
        row = select(freeze_results, "gradual", system, setting)
        assert row["difference"] <= 1e-5, row
    # Before the first change every system that freezes correctly is still with the reference.
    for row in freeze_results["rows"]:
        if row["table"] == "gradual" and row.get("drift") == 0:
            assert row["first_difference"] <= 1e-5, row
    wrong = select(freeze_results, "gradual", "torch DDP, first mask", "find_unused_parameters")
    assert wrong["disagreement"] > 1e-2


@pytest.mark.slow
def test_a_peer_that_is_not_installed_says_so(freeze_results: dict[str, Any]) -> None:
    for package, system in (
        ("lightning", "Lightning BaseFinetuning"),
        ("finetuning-scheduler", "finetuning-scheduler"),
    ):
        rows = [row for row in freeze_results["rows"] if row["system"] == system]
        assert len(rows) == 3
        absent = freeze_results["versions"][package] is None
        assert all(row["note"].startswith("not installed") == absent for row in rows)


def weights(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([0.0, value]) for name, value in values.items()}


def test_measures_see_drift_movement_disagreement_and_difference() -> None:
    right = [weights(low=0.0, top=0.0), weights(low=0.0, top=1.0), weights(low=2.0, top=3.0)]
    idle = [frozenset({"low"}), frozenset[str]()]

    def of(*ranks: list[dict[str, torch.Tensor]]) -> tuple[float | None, ...]:
        found = measure(ranks, idle=idle, expected=right, group_of=str)
        return found.drift, found.thawed, found.disagreement, found.difference

    assert of(right, right) == (0, 2, 0, 0)
    drifted = [right[0], weights(low=0.5, top=1.0), right[2]]
    assert of(right, drifted) == (0.5, 1.5, 0.5, 0)
    asleep = [right[0], right[1], weights(low=0.0, top=3.0)]
    assert of(asleep, right) == (0, 0, 2, 2)


def test_what_was_not_measured_does_not_hold() -> None:
    assert not claim("x", value=None, bound=1, direction="at most").holds
    assert not claim("x", value=float("nan"), bound=1, direction="at most").holds
    assert claim("x", value=0.0, bound=0.0, direction="at most").holds
    assert not claim("x", value=1e-9, bound=0.0, direction="at most").holds
    assert claim("x", value=2, bound=1, direction="at least").holds


def test_the_table_is_markdown() -> None:
    rows = [{"name": "a", "value": 0.0}, {"name": "long name"}, {"name": "b", "value": 1.5e-6}]
    assert markdown_table(rows, columns={"name": "name", "value": "value"}).splitlines() == [
        "| name      |   value |",
        "|-----------|--------:|",
        "| a         |       0 |",
        "| long name |       - |",
        "| b         | 1.5e-06 |",
    ]


def test_the_last_error_of_a_traceback_is_found() -> None:
    text = "Traceback:\nValueError: first\n\nDuring handling ...\ntorch.MyError: second\n  more\n"
    assert last_error(text) == "torch.MyError: second"
    assert last_error("process 1 was killed") == "process 1 was killed"
