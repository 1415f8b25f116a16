"""Intervals of one run, and narrower ones of the difference between two on the same rows."""

import numpy as np
import pytest

from dist_ft.tasks.base import Record
from dist_ft.tasks.text_classification import TextClassification
from dist_ft.train.evaluate import bootstrap, paired_bootstrap

METRICS = TextClassification(name="x", labels=("a", "b")).new_metrics()


def _records(right: np.ndarray) -> list[Record]:
    return [
        {"row": i, "label": 1, "prediction": int(good)} for i, good in enumerate(right.tolist())
    ]


def test_what_is_hard_for_both_cancels_out() -> None:
    draw = np.random.default_rng(1)
    worse = draw.uniform(size=400) < 0.7
    better = worse | (draw.uniform(size=400) < 0.1)  # right wherever the other is
    one, other = _records(better), _records(worse)
    value, low, high = paired_bootstrap(METRICS, one, other, resamples=200)["accuracy"]
    assert value == pytest.approx(better.mean() - worse.mean())
    assert 0 < low < value < high
    alone = bootstrap(METRICS, other, resamples=200)["accuracy"]
    assert high - low < 0.6 * (alone[1] - alone[0])


def test_other_rows_are_refused() -> None:
    records = _records(np.ones(4, bool))
    with pytest.raises(ValueError, match="on the same rows"):
        paired_bootstrap(METRICS, records, records[:3], resamples=2)
