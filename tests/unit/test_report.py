"""The report tells runs apart, takes the metric that decides, and draws only what is finite."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.report import write_report
from dist_ft.report.plots import plots_of
from dist_ft.report.record import COLUMNS, RunRecord, labelled, read_run
from dist_ft.report.svg import Axes, Line, bar_plot, line_plot

NAN, INF = math.nan, math.inf
AXES = Axes("step", "unit")


def _write(folder: Path, *, score: float = 0.5, lr: float = 0.1, **task: Any) -> Path:
    """Write the record of a run of one task."""
    folder.mkdir(parents=True)
    one = {"name": "text", "type": "text_classification", **task}
    (folder / "recipe.json").write_text(json.dumps({"tasks": [one], "optim": {"lr": lr}}))
    metrics = {"token_accuracy": score, "accuracy": score, "macro_f1": score}
    events = [
        {"event": "step", "step": 1, "time_s": 1.0, "task": "text", "loss": 2.0, "tokens": 1},
        {"event": "eval", "step": 1, "time_s": 1.0, "task": "text", "split": "validation",
         "metrics": metrics},
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return folder


def _record(path: str) -> RunRecord:
    return RunRecord(Path(path), [], [], {}, {})


def test_runs_of_one_name_stand_beside_each_other(tmp_path: Path) -> None:
    runs = [
        _write(tmp_path / place / "run", score=score, lr=score)
        for place, score in (("a", 0.125), ("b", 0.625), ("c/a", 0.875))
    ]
    text = write_report(runs).read_text()
    table = text[text.index("Scores side by side") :]
    row = "".join(f"<td class='n'>{score}</td>" for score in (0.125, 0.625, 0.875))
    assert f"<td>accuracy</td>{row}" in table
    assert f"<td>optim.lr</td>{row}" in text
    heads = re.findall("<th scope='col'>(.*?)</th>", table)[:6]
    assert heads[3:] == ["run (1)", "b/run", "run (3)"]


@pytest.mark.parametrize("name", COLUMNS)
def test_a_run_called_like_a_column_leaves_it_as_it_is(tmp_path: Path, name: str) -> None:
    runs = [_write(tmp_path / name, score=0.125), _write(tmp_path / "other", score=0.625, lr=0.2)]
    text = write_report(runs).read_text()
    row = "<td>text</td><td>validation</td><td>accuracy</td>"
    assert f"{row}<td class='n'>0.125</td><td class='n'>0.625</td>" in text
    assert "<td>optim.lr</td><td class='n'>0.1</td><td class='n'>0.2</td>" in text


@given(st.lists(st.sampled_from(["/a/x", "/b/x", "/c/b/x", "/y", "/x (1)", "/b/task", "/"])))
def test_labels_differ(paths: list[str]) -> None:
    labels = [run.label for run in labelled([_record(path) for path in paths])]
    assert len(set(labels)) == len(labels)
    assert not set(labels) & set(COLUMNS)


def test_the_folder_that_one_stands_in_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(_write(tmp_path / "mine"))
    assert "<title>dist_ft: mine</title>" in write_report([Path()]).read_text()


def test_the_metric_that_decides_is_one_that_was_scored(tmp_path: Path) -> None:
    plain = _write(tmp_path / "plain", type="token_classification")
    assert read_run(plain).primary("text") == "token_accuracy"
    assert "token_accuracy (decides)" in write_report([plain]).read_text()
    given = _write(tmp_path / "given", type="token_classification", metric="macro_f1")
    assert read_run(given).primary("text") == "macro_f1"
    (plain / "metrics.jsonl").write_text("")
    assert read_run(plain).primary("text") == "f1"


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("odd", [NAN, INF, -INF, 1.7e308])
@pytest.mark.parametrize("place", [0, 2])
def test_points_that_are_not_finite_are_left_out(odd: float, place: int, *, log: bool) -> None:
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]
    points[place] = (float(place), odd)
    axes = Axes("step", "unit", log=log)
    plot = line_plot("a", "curve", [Line("x", points), Line("y", [(odd, 1.0)])], axes)
    assert plot is not None
    assert plot.title == "curve (not finite and left out: 2)"
    ET.fromstring(plot.standalone())
    assert not re.search(r"\b(nan|inf)\b", plot.body)
    assert plot.body.count("<circle") == 2
    assert line_plot("a", "none", [Line("x", [(0.0, odd)])], AXES) is None


def test_bars_that_are_not_finite_are_left_out() -> None:
    rows = [("0", [NAN, 1.0]), ("1", [2.0, INF])]
    plot = bar_plot("a", "bars", rows, names=["x", "y"], axes=AXES)
    assert plot is not None
    assert plot.title == "bars (not finite and left out: 2)"
    assert plot.body.count("class='bar") == 2
    assert not re.search(r"\b(nan|inf)\b", plot.body)
    assert bar_plot("a", "bars", [("0", [NAN, 0.0])], names=["x", "y"], axes=AXES) is None


def test_shades_and_scores_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    run = _write(tmp_path / "run")
    groups = {"event": "groups", "time_s": 1.0, "gradient_norm": {}}
    drifts = [{"a": 0.1, "b": NAN}, {"a": INF, "b": 0.4}]
    events = [{**groups, "step": step, "drift": d} for step, d in enumerate(drifts, start=1)]
    scored = {"event": "eval", "task": "text", "split": "validation", "time_s": 1.0}
    events.append({**scored, "step": 2, "metrics": {"accuracy": NAN}})
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)
    plots = {plot.slug: plot for plot in plots_of(read_run(run))}
    drift = plots["freeze-drift"]
    assert drift.title.endswith("(not finite and left out: 2)")
    assert len(re.findall("<rect class='frozen'[^>]*><title>", drift.body)) == 2
    assert "0.1 to 0.4" in drift.body
    assert "left out: 1)" in plots["scores-text"].title
    assert ">accuracy<" in plots["scores-text"].body
