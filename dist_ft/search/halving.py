"""Successive halving over blocks: train all a little, half of them twice as long, and so on.

Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter
optimization". Those that go on continue from where they stopped. Deep stacks are searched coarse
to fine: the winner of a coarse grid races against its neighbours at half the granularity, until
none of them beats it. That assumes that neighbouring blocks score alike; within one grid nothing
is assumed but that early scores order the candidates as late ones do.

Everything here is a pure function of the scores, so ranks that see the same scores agree, and a
search that was stopped is repeated from its record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from dist_ft.search.blocks import Block, Space

MOST_RUNGS = 12
C = TypeVar("C")
C_contra = TypeVar("C_contra", contravariant=True)


class Costs(Protocol[C_contra]):
    """What says how dear the candidates are."""

    def cost(self, candidate: C_contra, /) -> float:
        """Return the arithmetic of a training step, in any unit."""
        ...


class Score(NamedTuple):
    """What a candidate has come to at a rung.

    Attributes:
        value: Its validation score, larger is better.
        loss: Its validation loss, which decides among equals: early on, many candidates still
            answer the most frequent class and score the same.
    """

    value: float
    loss: float = 0.0

    @property
    def diverged(self) -> bool:
        """Whether the run has come to no number."""
        return math.isnan(self.value) or math.isnan(self.loss)

    def key(self) -> tuple[float, float]:
        """Return a sort key, best first; a run that has diverged comes last."""
        return (math.inf, math.inf) if self.diverged else (-self.value, self.loss)


DIVERGED = Score(math.nan, math.nan)


class AllDivergedError(RuntimeError):
    """A search of which nobody is left."""

    def __init__(self, step: int) -> None:
        """Say what to do about it, given the step up to which all have diverged."""
        super().__init__(
            f"search: by step {step} every candidate that was left had diverged: lower optim.lr or "
            "the upper ends of --over; what each came to is in study.journal and its run's "
            "metrics.jsonl"
        )


def rung_steps(count: int, *, total_steps: int) -> tuple[int, ...]:
    """Return the steps at which candidates are compared, each about twice the one before."""
    return tuple(-(-total_steps // 2 ** (count - 1 - i)) for i in range(count))


def halving_steps(entrants: int, rungs: Sequence[int]) -> int:
    """Return the optimizer steps that halving trains with this many new entrants."""
    steps, done = 0, 0
    for rung in rungs:
        steps += entrants * (rung - done)
        entrants, done = survivors(entrants), rung
    return steps


def survivors(entrants: int) -> int:
    """Return how many of a rung's entrants go on."""
    return max(1, entrants // 2)


def plan_rungs(entrants: int, *, total_steps: int, budget: float, shortest: int) -> tuple[int, ...]:
    """Return the fewest rungs with which halving keeps to the budget.

    Fewer rungs mean a longer first one, after which half of the candidates are given up.

    Args:
        entrants: Candidates of the first grid.
        total_steps: Length of a whole run in optimizer steps.
        budget: Share of training all candidates to the end.
        shortest: Fewest steps that say anything about a candidate.

    Raises:
        ValueError: If the budget cannot be kept.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"--budget is a share above 0 and at most 1, got {budget:g}: use 0.35")
    least = 1.0
    for count in range(1, MOST_RUNGS + 1):
        rungs = rung_steps(count, total_steps=total_steps)
        if rungs[0] < shortest or len(set(rungs)) < count:
            break
        share = halving_steps(entrants, rungs) / (entrants * total_steps)
        if share <= budget:
            return rungs
        least = min(least, share)
    raise ValueError(
        f"--budget: {budget:g} of training {entrants} candidates for {total_steps} steps cannot be "
        f"kept if each is to train for {shortest} steps or more: raise it to "
        f"{math.ceil(100 * least) / 100:g}, or train.max_duration"
    )


@dataclass
class Halving(Generic[C]):
    """What successive halving has measured and decided so far.

    Attributes:
        space: Says how dear the candidates are.
        rungs: Steps at which they are compared; the last is the whole run.
        score: Trains a candidate up to a step and returns its score on validation.
        drop: Called with every candidate that is given up.
        allowance: Optimizer steps that the search may train in all.
        scores: What each candidate scored at which step.
        best: The candidate that has won so far.
    """

    space: Costs[C]
    rungs: tuple[int, ...]
    score: Callable[[C, int], Score]
    drop: Callable[[C], None]
    allowance: float
    scores: dict[C, dict[int, Score]] = field(default_factory=dict)
    best: C | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps trained for all candidates together."""
        return sum(max(by_step) for by_step in self.scores.values())

    @property
    def cost(self) -> float:
        """Arithmetic of these steps, in the unit of `Space.cost`."""
        return sum(self.space.cost(b) * max(by_step) for b, by_step in self.scores.items())

    def halve(self, entrants: Sequence[C]) -> C:
        """Return the best of `entrants` and of the best so far, which takes part for free.

        The best so far has scores at every rung; a newcomer goes on if it is among the
        better half of all at its rung, and has not diverged. If no newcomer is left, the best so
        far stays the best.

        Raises:
            AllDivergedError: If nobody is left, and there was no best before.
        """
        pool = [*entrants] if self.best is None else [self.best, *entrants]
        for rung in self.rungs:
            if pool == [self.best]:
                break
            keep = 1 if rung == self.rungs[-1] else survivors(len(pool))
            pool = self._compare(pool, rung=rung, keep=keep)
        winner, former = pool[0], self.best
        if former is not None and winner != former:
            winner, loser = sorted((winner, former), key=lambda b: self.rank(b, self.rungs[-1]))
            self.drop(loser)
        self.best = winner
        return winner

    def _compare(self, pool: Sequence[C], *, rung: int, keep: int) -> list[C]:
        """Return the `keep` best of the pool at a rung, best first.

        A candidate is given up as soon as `keep` others are better, so that few need be kept.
        """
        leaders: list[C] = []
        for candidate in pool:
            self._measure(candidate, rung)
            entered = [*leaders, candidate]
            numbers = [c for c in entered if not self.scores[c][rung].diverged]
            leaders = sorted(numbers, key=lambda b: self.rank(b, rung))[:keep]
            for lost in entered:
                if lost not in leaders and lost != self.best:
                    self.drop(lost)
        if leaders:
            return leaders
        if self.best is None:
            raise AllDivergedError(rung)
        # Newcomers were ahead of the best so far and have all diverged since: it has come further.
        return [self.best]

    def _measure(self, candidate: C, rung: int) -> None:
        known = self.scores.setdefault(candidate, {})
        if rung not in known:
            known[rung] = self.score(candidate, rung)

    def rank(self, candidate: C, rung: int) -> Any:
        """Return a sort key, best first: the score, and among equals the cheaper candidate."""
        return (*self.scores[candidate][rung].key(), self.space.cost(candidate), candidate)

    def ranking(self) -> list[C]:
        """Return all candidates, best first: those that came further are before the others."""

        def key(candidate: C) -> Any:
            last = max(self.scores[candidate])
            return (-last, self.rank(candidate, last))

        return sorted(self.scores, key=key)


@dataclass
class Race(Halving[Block]):
    """A search among contiguous blocks, coarse to fine.

    Attributes:
        space: The candidates.
    """

    space: Space  # pyright: ignore[reportIncompatibleVariableOverride] - nobody replaces it

    def run(self) -> Block:
        """Return the best block, searching coarse to fine."""
        granules = self.space.granules()
        best = self.halve(self.space.grid(granules[0]))
        for granule in granules[1:]:
            best = self._climb(best, granule)
        return best

    def _climb(self, best: Block, granule: int) -> Block:
        """Return the block that none of its neighbours beats, or the best that can be afforded."""
        while True:
            near = [b for b in self.space.neighbours(best, granule) if b not in self.scores]
            # The best so far counts as an entrant, so this is more than the newcomers can take.
            most = halving_steps(len(near) + 1, self.rungs)
            if not near or self.steps + most > self.allowance:
                return best
            winner = self.halve(near)
            if winner == best:
                return best
            best = winner


def make_race(
    space: Space,
    *,
    total_steps: int,
    budget: float,
    shortest: int,
    score: Callable[[Block, int], Score],
    drop: Callable[[Block], None],
) -> Race:
    """Return a search that trains at most `budget` of the finest grid's steps.

    Raises:
        ValueError: If the budget cannot be kept.
    """
    first = space.grid(space.granules()[0])
    rungs = plan_rungs(len(first), total_steps=total_steps, budget=budget, shortest=shortest)
    allowance = budget * len(space.grid(space.granule)) * total_steps
    return Race(space, rungs, score, drop, allowance)
