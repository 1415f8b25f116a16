"""The candidates of a search over recipe keys."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.search.keys import Candidate, Range, draw

RANGES = [
    Range.parse(t) for t in ("optim.lr=log:1e-5:1e-3", "regularization.mixout=uniform:0.1:0.5")
]


@given(count=st.integers(2, 40), seed=st.integers(0, 2**31))
def test_every_part_of_a_range_has_one_candidate(count: int, seed: int) -> None:
    candidates = draw(RANGES, count=count, seed=seed)
    assert candidates == draw(RANGES, count=count, seed=seed)
    assert candidates[0] == Candidate(0)
    parts = count - 1
    rates = sorted(float(c.overrides[0].removeprefix("optim.lr=")) for c in candidates[1:])
    assert len(rates) == parts
    for part, rate in enumerate(rates):
        place = math.log(rate / 1e-5) / math.log(100) * parts
        # Rates are rounded to four digits.
        assert part - 1e-2 <= place <= part + 1 + 1e-2


def test_choices_and_whole_numbers() -> None:
    ranges = [
        Range.parse("freezing.depth=int:1:3"),
        Range.parse("regularization.r_drop=choice:null|1"),
    ]
    candidates = draw(ranges, count=61, seed=0)
    assert {c.overrides for c in candidates[1:]} == {
        (f"freezing.depth={d}", f"regularization.r_drop={r}")
        for d in (1, 2, 3)
        for r in ("null", "1")
    }
    assert [c.number for c in candidates] == list(range(7))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lr", "write it like"),
        ("optim.lr=1:2", "kinds are log"),
        ("optim.lr=log:0:1", "above 0"),
        ("optim.lr=log:a:1", "could not convert"),
        ("optim.lr=uniform:2:1", "below the second"),
        ("train.global_batch_size=int:1:4", "can't be searched"),
    ],
)
def test_wrong_ranges_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Range.parse(text)
