"""Population-based training over recipe keys (Jaderberg et al. 2017).

All members of a population train at once, as one would by hand: after each round the worst quarter,
and whoever has diverged, go on from the weights of members of the best quarter (exploit), with
values moved by a fifth up or down (explore). What is found is a trained model and the values that
it was trained with, round by round, not a recipe.

Who is replaced by whom, and how values move, is a function of the scores and the recipe's seed, so
ranks agree and a search that was stopped is repeated from its record.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dist_ft import dist
from dist_ft.config import Recipe
from dist_ft.search.candidates import Candidates, Outcome
from dist_ft.search.halving import AllDivergedError, Score
from dist_ft.search.keys import Range, draw
from dist_ft.search.session import run_session
from dist_ft.search.writing import TABLE, as_csv
from dist_ft.train.console import Console
from dist_ft.train.ending import DONE
from dist_ft.train.parts import make_parts
from dist_ft.train.run_folder import RunFolder
from dist_ft.train.segment import Place

Load = Callable[[Sequence[str]], Recipe]

# Keys that may change while a run goes on: numbers that no state in a checkpoint depends on.
SECTIONS = ("optim", "regularization")
_FACTORS = (0.8, 1.2)


@dataclass(frozen=True)
class Member:
    """One of the population, from the round on in which it came.

    Attributes:
        number: Its own; members that come in later rounds have higher ones.
        values: By key; what is not named is as in the recipe.
        parent: Number of the member whose weights it took over; None of the first ones.
        born: Round in which it began, from 0.
    """

    number: int
    values: Mapping[str, float]
    parent: int | None = None
    born: int = 0

    @property
    def overrides(self) -> tuple[str, ...]:
        """The values as on the command line."""
        return tuple(f"{key}={value:g}" for key, value in self.values.items())

    def describe(self) -> str:
        """Return the values in words."""
        return " ".join(self.overrides) or "the recipe itself"


def evolve(
    members: Sequence[Member],
    scores: Mapping[int, Score],
    *,
    ranges: Sequence[Range],
    born: int,
    seed: int,
) -> list[Member]:
    """Return the members of the next round, each in its place.

    Members that have diverged have no weights to go on with: they are replaced, too, and none of
    them replaces another. At least one must not have diverged.

    Args:
        members: Of the round that has ended.
        scores: By number.
        ranges: Of the keys; values stay inside.
        born: The next round.
        seed: Of the recipe.
    """
    ranked = sorted(members, key=lambda m: (*scores[m.number].key(), m.number))
    quarter = max(1, len(members) // 4)
    diverged = {m.number for m in members if scores[m.number].diverged}
    best = [m for m in ranked[:quarter] if m.number not in diverged]
    worst = {m.number for m in ranked[-quarter:]} | diverged
    following: list[Member] = []
    for place, member in enumerate(members):
        if member.number not in worst:
            following.append(member)
            continue
        dice = random.Random(f"population {seed} {born} {place}")
        parent = dice.choice(best)
        number = born * len(members) + place
        values = {r.key: _explored(parent.values.get(r.key), r, dice) for r in ranges}
        following.append(Member(number, values, parent=parent.number, born=born))
    return following


def _explored(value: float | None, of_key: Range, dice: random.Random) -> float:
    if value is None:  # the recipe itself, which does not set the key
        return float(of_key.value(dice.random()))
    assert of_key.bounds is not None
    low, high = of_key.bounds
    return float(f"{min(high, max(low, value * dice.choice(_FACTORS))):.4g}")


def check_ranges(texts: Sequence[str]) -> list[Range]:
    """Return the ranges as written, all of numbers that may change within a run.

    Raises:
        ValueError: If there are none, or one is of something else.
    """
    if not texts:
        raise ValueError("--rounds moves values: say which by --over KEY=KIND:VALUES")
    ranges = [Range.parse(text) for text in texts]
    for of_key in ranges:
        if of_key.bounds is None or of_key.key.split(".")[0] not in SECTIONS:
            raise ValueError(
                f"--over: {of_key.key} can't change while a run goes on, as with --rounds: use "
                f"log: or uniform: ranges of {' and '.join(SECTIONS)}, or leave --rounds out"
            )
    return ranges


def first_members(base: Recipe, ranges: Sequence[Range], *, count: int) -> list[Member]:
    """Return the recipe itself and members spread over the ranges; they are all different."""
    own = {r.key: value for r in ranges if (value := _number_at(base, r.key)) is not None}
    drawn = draw(ranges, count=count, seed=base.seed)[1:]
    others = [{k: float(v) for k, v in (o.split("=") for o in c.overrides)} for c in drawn]
    return [Member(number, values) for number, values in enumerate([own, *others])]


def _number_at(recipe: Recipe, key: str) -> float | None:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part, None)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else None


def round_ends(rounds: int, *, total_steps: int, shortest: int) -> list[int]:
    """Return the steps at which rounds end, the last at the end of the run.

    Raises:
        ValueError: If rounds are shorter than `shortest` steps.
    """
    if rounds < 2 or total_steps // rounds < shortest:
        raise ValueError(
            f"--rounds must be at least 2 and leave {shortest} steps or more to a round, got "
            f"{rounds} for {total_steps} steps: lower it, or raise train.max_duration"
        )
    return [total_steps * (i + 1) // rounds for i in range(rounds)]


@dataclass
class Population:
    """Everybody that there has been; the subject of the search.

    Attributes:
        load: Returns the recipe with overrides.
        members: By number.
        scores: What each scored at which step.
    """

    load: Load
    members: dict[int, Member] = field(default_factory=dict)
    scores: dict[int, dict[int, Score]] = field(default_factory=dict)
    _recipes: dict[int, Recipe] = field(default_factory=dict)

    def add(self, members: Sequence[Member]) -> list[Member]:
        """Take in members, whose recipes are checked; return those that are new."""
        new = [m for m in members if m.number not in self.members]
        for member in new:
            self.members[member.number] = member
            self._recipes[member.number] = self.load(member.overrides)
        return new

    def describe(self, candidate: int, /) -> str:
        """Return a member in words."""
        return f"member {candidate}, {self.members[candidate].describe()}"

    def run_name(self, candidate: int, /) -> str:
        """Return the name of a member's run."""
        return f"member-{candidate:03d}"

    def recipe_for(self, candidate: int, /) -> Recipe:
        """Return the recipe that a member trains with."""
        return self._recipes[candidate]

    def lineage(self, number: int) -> list[Member]:
        """Return whose weights became those of a member, the first of them first."""
        line = [self.members[number]]
        while (parent := line[0].parent) is not None:
            line.insert(0, self.members[parent])
        return line


class MemberCodes:
    """Members by their number; values follow from the scores before."""

    def __init__(self, most: int) -> None:
        """Code numbers from 0 to `most`."""
        self._most = most

    def params(self, candidate: int) -> dict[str, Any]:
        """Return the number."""
        return {"number": candidate}

    def distributions(self, optuna: Any) -> dict[str, Any]:
        """Return the range of numbers."""
        return {"number": optuna.distributions.IntDistribution(0, self._most)}

    def candidate(self, params: Mapping[str, Any]) -> int:
        """Return the number."""
        return params["number"]


def tune_population(
    load: Load, *, over: Sequence[str], count: int, rounds: int, resume: bool
) -> Outcome:
    """Train a population and write its table; every rank calls it.

    Args:
        load: Returns the recipe with overrides.
        over: Ranges of keys as on the command line.
        count: Members, the recipe itself among them.
        rounds: After all but the last, the worst quarter goes on from the best.
        resume: Go on with the search that is there.

    Raises:
        ValueError: If a range or recipe is wrong, or another search is in the folder.
        RuntimeError: If Optuna is not installed, or all members diverge.
    """
    base, ranges = load(()), check_ranges(over)
    population = Population(load)
    members = first_members(base, ranges, count=count)
    population.add(members)

    def look(console: Console) -> list[int]:
        total = make_parts(base, console.say).total_steps
        return round_ends(rounds, total_steps=total, shortest=len(base.tasks))

    def search(ends: list[int], place: Place, console: Console) -> Outcome:
        runs = Candidates(base, subject=population, place=place, console=console)
        opened = runs.opened(
            {"over": list(over), "trials": count, "rounds": rounds},
            codes=MemberCodes(rounds * len(members)), total_steps=ends[-1], resume=resume,
        )  # fmt: skip
        with opened:
            console.say(f"search: {len(members)} members, {rounds} rounds to {ends[-1]} steps")
            now = members
            for born, (end, following) in enumerate(
                zip(ends, [*ends[1:], None], strict=True), start=1
            ):
                for member in now:
                    found = runs.score(member.number, end)
                    population.scores.setdefault(member.number, {})[end] = found
                if all(population.scores[m.number][end].diverged for m in now):
                    raise AllDivergedError(end)
                if following is not None:
                    before = now
                    at_end = {m.number: population.scores[m.number][end] for m in now}
                    now = evolve(now, at_end, ranges=ranges, born=born, seed=base.seed)
                    new = population.add(now)
                    dist.on_main(partial(_inherit, population, new, runs=runs, until=following))
                    for number in {m.number for m in before} - {m.number for m in now}:
                        runs.drop(number)
            return _finish(population, now, ends=ends, runs=runs)

    return run_session(base, look=look, search=search)


def _inherit(
    population: Population, new: Sequence[Member], *, runs: Candidates[int], until: int
) -> None:
    """Give new members the weights of their parents, all before any of them trains; on rank 0.

    Those that have a score at `until` have had them, in a search that goes on; their parents may
    have been given up since.
    """
    assert runs.record is not None
    for member in new:
        if runs.record.score(member.number, until) is None:
            assert member.parent is not None
            source, target = (
                RunFolder(runs.folder.runs / population.run_name(number)).checkpoints
                for number in (member.parent, member.number)
            )
            _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    """Copy checkpoints to their new place, where they are whole or not at all."""
    if target.exists():  # a search that goes on; the source may have been trained further since
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(".copy")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    temporary.replace(target)


def _finish(
    population: Population, last: Sequence[Member], *, ends: Sequence[int], runs: Candidates[int]
) -> Outcome:
    """Write the table, on rank 0."""
    if runs.record is None:
        return Outcome(DONE)
    order = sorted(
        population.members,
        key=lambda n: (
            -max(population.scores[n]),
            *population.scores[n][max(population.scores[n])].key(),
            n,
        ),
    )
    begins = [0, *ends]
    rows: list[dict[str, Any]] = []
    for number in order:
        member, step = population.members[number], max(population.scores[number])
        score = population.scores[number][step]
        rows.append(
            {
                "member": number,
                "parent": "" if member.parent is None else member.parent,
                "from_step": begins[member.born],
                "to_step": step,
                "score": score.value,
                "loss": score.loss,
                **member.values,
            }
        )
    for member in last:
        runs.record.settle(member.number)
    root, best = runs.folder.root, order[0]
    (root / TABLE).write_text(as_csv(rows), encoding="utf-8")
    lines = [
        f"from step {begins[m.born]}: member {m.number}, {m.describe()}"
        for m in population.lineage(best)
    ]
    run = runs.folder.runs / population.run_name(best)
    value = population.scores[best][ends[-1]].value
    told = "\n".join([f"best: {value:.4f} after {ends[-1]} steps", *lines])
    return Outcome(DONE, f"{told}\ntrained: {run}\nwritten: {root / TABLE}")
