"""Forgetting is counted as written out by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.train.forgetting import MOST_ROWS, correct_rows, count_forgetting


def _event(step: int, right: list[bool]) -> dict[str, object]:
    records = [{"row": i, "prediction": int(r), "label": 1} for i, r in enumerate(right)]
    bits = correct_rows(records)
    return {"event": "eval", "task": "t", "split": "validation", "step": step,
            "rows": len(right), "correct": bits}  # fmt: skip


@given(st.integers(1, 40).flatmap(
    lambda rows: st.lists(
        st.lists(st.booleans(), min_size=rows, max_size=rows), min_size=2, max_size=6
    )
))  # fmt: skip
def test_every_fall_from_right_to_wrong_counts_once(history: list[list[bool]]) -> None:
    rows = len(history[0])
    events = [_event(step, right) for step, right in enumerate(history)]
    found = count_forgetting(events, task="t", rows=rows)
    assert found is not None
    for row in range(rows):
        course = [right[row] for right in history]
        falls = sum(a and not b for a, b in pairwise(course))
        assert found.events[row] == falls
        assert found.ever_right[row] == any(course)
    summary = found.summary()
    assert summary["events"] == sum(count for _, count in found.most(rows))
    forgotten = sum(count > 0 for count in found.events)
    assert summary["never_learnt"] + summary["never_forgotten"] + forgotten == rows


def test_what_cannot_be_right_or_wrong_is_not_counted() -> None:
    assert correct_rows([{"row": 0, "prediction": 0.5, "label": 0.5}]) is None
    assert correct_rows([{"row": 0, "text": "a"}]) is None
    assert correct_rows([]) is None
    assert correct_rows([{"prediction": 1, "label": 1}] * (MOST_ROWS + 1)) is None
    tags = [{"prediction": [1, 2], "label": [1, 2]}, {"prediction": [1, 2], "label": [1, 0]}]
    assert correct_rows(tags) is not None
    once = [_event(3, [True, False])]
    assert count_forgetting(once, task="t", rows=2) is None
    # One step evaluated again, as after a crash, is one evaluation; other rows are other data.
    again = [*once, _event(3, [False, False]), _event(4, [True] * 3)]
    assert count_forgetting(again, task="t", rows=2) is None
    later = count_forgetting([*again, _event(5, [True, True])], task="t", rows=2)
    assert later is not None
    assert np.array_equal(later.events, [0, 0])
