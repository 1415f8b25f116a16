"""Who goes on from whom in a population, and with which values."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dist_ft.search.halving import Score
from dist_ft.search.population import Member, check_ranges, evolve, round_ends

RANGES = check_ranges(["optim.lr=log:1e-5:1e-3", "regularization.mixout=uniform:0.1:0.5"])
_VALUE = st.one_of(st.just(math.nan), st.floats(-1, 1))


@given(
    scores=st.lists(_VALUE, min_size=2, max_size=24),
    seed=st.integers(0, 2**31),
    places=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
)
def test_the_worst_quarter_and_who_has_diverged_go_on_from_the_best(
    scores: list[float], seed: int, places: tuple[float, float]
) -> None:
    values = {r.key: r.value(p) for r, p in zip(RANGES, places, strict=True)}
    members = [Member(0, {}), *(Member(i, values) for i in range(1, len(scores)))]
    found = {i: Score(value) for i, value in enumerate(scores)}
    assume(not all(map(math.isnan, scores)))  # the search has ended then
    after = evolve(members, found, ranges=RANGES, born=3, seed=seed)
    assert after == evolve(members, found, ranges=RANGES, born=3, seed=seed)
    quarter = max(1, len(scores) // 4)
    # A run that has diverged is worse than all others.
    order = sorted(range(len(scores)), key=lambda i: (math.isnan(scores[i]), -scores[i], i))
    for place, (member, new) in enumerate(zip(members, after, strict=True)):
        if place not in order[-quarter:] and not math.isnan(scores[place]):
            assert new is member
            continue
        assert new.parent in order[:quarter]
        assert not math.isnan(scores[new.parent])
        assert (new.number, new.born) == (3 * len(scores) + place, 3)
        for of_key in RANGES:
            low, high = of_key.bounds or (0.0, 0.0)
            value, before = new.values[of_key.key], members[new.parent].values.get(of_key.key)
            assert low <= value <= high
            if before is not None:
                moved = [min(high, max(low, before * factor)) for factor in (0.8, 1.2)]
                assert any(value == pytest.approx(m, rel=1e-3) for m in moved)


@given(total=st.integers(1, 5000), rounds=st.integers(2, 9), shortest=st.integers(1, 4))
def test_rounds_are_alike_and_end_with_the_run(total: int, rounds: int, shortest: int) -> None:
    if total // rounds < shortest:
        with pytest.raises(ValueError, match="--rounds must be"):
            round_ends(rounds, total_steps=total, shortest=shortest)
        return
    ends = round_ends(rounds, total_steps=total, shortest=shortest)
    lengths = [b - a for a, b in zip([0, *ends], ends, strict=False)]
    assert ends[-1] == sum(lengths) == total
    assert max(lengths) - min(lengths) <= 1
    assert min(lengths) >= shortest


@pytest.mark.parametrize(
    "text", ["freezing.depth=int:1:3", "optim.lr=choice:1e-3|1e-4", "balancing.lr=log:1e-3:1"]
)
def test_what_cannot_change_within_a_run_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="can't change while a run goes on"):
        check_ranges([text])
    with pytest.raises(ValueError, match="say which by --over"):
        check_ranges([])
