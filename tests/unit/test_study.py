"""The study of strategies: what it plans, resumes and says of its results."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.study.data import SETS, failed
from benchmarks.study.runs import plans, read_results
from benchmarks.study.strategies import BASELINE, MULTI, STRATEGIES, make_recipe
from benchmarks.study.summary import summarise
from dist_ft.recipe import load_recipe


def _result(strategy: str, name: str, seed: int, score: float | None) -> dict[str, Any]:
    return {
        "part": "small",
        "strategy": strategy,
        "set": name,
        "seed": seed,
        "score": score,
        "failed": score is None,
        "cpu_s": 2.0,
    }


def test_every_strategy_is_a_valid_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "question": "q",
        "text": "t",
        "label": "a",
        "coarse": "a",
        "tokens": ["x"],
        "tags": ["O"],
    }

    def written(name: str, **_: Any) -> dict[str, str]:
        path = tmp_path / f"{name}.jsonl"
        path.write_text(f"{json.dumps(row)}\n" * 500)
        return {"train": str(path), "validation": str(path)}

    monkeypatch.setattr("benchmarks.study.strategies.write_set", written)
    for plan in plans("small", strategies=list(STRATEGIES), sets=["trec", "wnut16"], seeds=1):
        recipe = make_recipe(plan.strategy, sets=plan.sets, part="small", seed=0, folder=tmp_path)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        loaded = load_recipe(path, needs_files=False)
        assert len(loaded.tasks) == (2 if plan.strategy in MULTI else 1)


def test_differences_are_of_the_same_set_and_seed() -> None:
    results = [
        _result(BASELINE, "trec", 0, 0.8),
        _result(BASELINE, "trec", 1, 0.9),
        _result("R-Drop 1", "trec", 0, 0.82),
        _result("R-Drop 1", "trec", 1, 0.92),
        _result("R-Drop 1", "sms_spam", 0, None),
    ]
    base, other = summarise(results, part="small")
    assert base["trec"] == "85.0 ± 7.1"
    assert base["difference"] is None
    assert other["difference"] == "+2.0 (+2.0 to +2.0)"
    assert other["failures"] == "1 of 3"
    assert other["cpu_s"] == 2.0
    assert summarise(results, part="full") == []


def test_a_line_that_was_cut_short_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(_result(BASELINE, "trec", 0, 0.8)) + "\n" + '{"part": "sm')
    assert [r["set"] for r in read_results(path)] == ["trec"]


def test_constant_answers_are_failures() -> None:
    assert set(SETS) == {"trec", "sms_spam", "movie_sentiment", "wnut16"}
    assert failed("trec", metrics={"accuracy": 0.25, "baseline_majority_accuracy": 0.25})
    assert not failed("trec", metrics={"accuracy": 0.26, "baseline_majority_accuracy": 0.25})
    assert failed("wnut16", metrics={"f1": 0.0})
    # Always ham at 0.88: F1 of ham 2 * 0.88 / 1.88, of spam 0, their mean 0.468.
    assert failed("sms_spam", metrics={"macro_f1": 0.468, "baseline_majority_accuracy": 0.88})
    assert not failed("sms_spam", metrics={"macro_f1": 0.6, "baseline_majority_accuracy": 0.88})
