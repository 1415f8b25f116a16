"""The search is right and cheap where scores have no noise and order as they will at the end."""

from __future__ import annotations

import math
import random
from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft.search.blocks import Block, Space, make_space
from dist_ft.search.halving import Race, Score, make_race

BUDGET = 0.35


class Curves:
    """Synthetic learning curves: rising in the steps, and at every step in the quality."""

    def __init__(self, quality: dict[Block, float]) -> None:
        self.quality = quality
        self.trained: dict[Block, int] = defaultdict(int)
        self.dropped: list[Block] = []

    def score(self, block: Block, step: int) -> Score:
        assert step > self.trained[block], "steps are trained once"
        assert block not in self.dropped, "who was given up does not come back"
        self.trained[block] = step
        return Score(math.atan(self.quality[block]) * math.log1p(step) ** 0.5)

    def drop(self, block: Block) -> None:
        self.dropped.append(block)

    def race(self, space: Space, *, total_steps: int, budget: float = BUDGET) -> Race:
        return make_race(
            space,
            total_steps=total_steps,
            budget=budget,
            shortest=1,
            score=self.score,
            drop=self.drop,
        )


def best_of(quality: dict[Block, float]) -> Block:
    return max(quality, key=lambda b: quality[b])


@settings(max_examples=200, deadline=None)
@given(blocks=st.integers(2, 6), seed=st.integers(0, 2**32), steps=st.integers(16, 5000))
def test_one_grid_finds_the_best_whatever_the_scores(blocks: int, seed: int, steps: int) -> None:
    space = make_space([10] * blocks, granule=1)
    draw = random.Random(seed)
    curves = Curves({b: draw.random() for b in space.grid(1)})
    race = curves.race(space, total_steps=steps)
    best = race.run()
    assert best == best_of(curves.quality)
    grid = len(curves.quality) * steps
    assert sum(curves.trained.values()) == race.steps <= BUDGET * grid
    assert curves.trained[best] == steps
    # Only the winner is kept, and everyone else is told exactly once.
    assert sorted([*curves.dropped, best]) == sorted(curves.quality)


@settings(max_examples=300, deadline=None)
@given(
    blocks=st.integers(2, 32),
    granule=st.integers(1, 3),
    ends=st.tuples(st.integers(0, 100), st.integers(0, 100)),
    slopes=st.tuples(*[st.floats(0.2, 5.0)] * 4),
    power=st.sampled_from([1.0, 2.0]),
)
def test_a_deep_stack_is_within_one_granule_of_the_exhaustive_optimum(
    blocks: int,
    granule: int,
    ends: tuple[int, int],
    slopes: tuple[float, float, float, float],
    power: float,
) -> None:
    """Scores with one summit anywhere, falling off at different speeds on its four sides."""
    space = make_space([10] * blocks, granule=min(granule, blocks // 2))
    lo, hi = sorted((ends[0] % blocks, ends[1] % blocks + 1))
    hi = max(hi, lo + 1)

    def away(distance: int, down: float, up: float) -> float:
        return (down if distance < 0 else up) * abs(distance) ** power

    quality = {
        b: -away(b.lo - lo, *slopes[:2]) - away(b.hi - hi, *slopes[2:])
        for b in space.grid(space.granule)
    }
    curves = Curves(quality)
    race = curves.race(space, total_steps=1024)
    found, optimum = race.run(), best_of(quality)
    if optimum.depth:
        assert abs(found.lo - optimum.lo) <= space.granule
        assert abs(found.hi - optimum.hi) <= space.granule
    assert race.steps <= BUDGET * len(quality) * 1024


@settings(max_examples=300, deadline=None)
@given(blocks=st.integers(2, 24), budget=st.floats(0.08, 1.0), seed=st.integers(0, 2**32))
def test_no_scores_make_a_search_cost_more_than_its_budget(
    blocks: int, budget: float, seed: int
) -> None:
    space = make_space([10] * blocks, granule=1)
    draw = random.Random(seed)
    # Finer candidates tend to be better, so that the search has reason to go on.
    curves = Curves({b: draw.random() + (b.lo % 2) + (b.hi % 2) for b in space.grid(1)})
    try:
        race = curves.race(space, total_steps=4096, budget=budget)
    except ValueError:
        assert blocks < 6 or budget < 0.1  # too few candidates, or too many rungs
        return
    best = race.run()
    assert race.steps <= budget * len(curves.quality) * 4096
    assert sum(curves.trained.values()) == race.steps
    at_end = {b for b, by_step in race.scores.items() if 4096 in by_step}
    assert best == max(at_end, key=lambda b: curves.quality[b])
    assert sorted([*curves.dropped, best]) == sorted(race.scores)
