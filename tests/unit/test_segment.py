"""What a segment of a run comes to: the one score by which a search ranks."""

from __future__ import annotations

import math

import pytest

from dist_ft.config_evaluation import EvaluationConfig
from dist_ft.train.segment import one_score

FIRST, SECOND = {"a": 0.9, "b": 0.3}, {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (EvaluationConfig(decide_by="mean"), (0.6, 0.5)),
        (EvaluationConfig(decide_by="worst"), (0.3, 0.5)),
        (EvaluationConfig(decide_by="weighted", weights={"b": 3.0}), (0.45, 0.5)),
        (EvaluationConfig(), (0.6, 0.5)),
    ],
)
def test_runs_are_ranked_by_what_the_recipe_decides_by(
    config: EvaluationConfig, expected: tuple[float, float]
) -> None:
    found = one_score(FIRST, config), one_score(SECOND, config)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("by", ["each", "mean", "worst", "weighted"])
def test_a_score_that_is_no_number_is_none_in_any_order(by: str) -> None:
    config = EvaluationConfig.model_validate({"decide_by": by})
    for scores in ({"a": 0.5, "b": math.nan}, {"b": math.nan, "a": 0.5}):
        assert math.isnan(one_score(scores, config))
