"""Searches over recipe keys: learning rate, depth, regularisation, by successive halving."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from dist_ft.config import Recipe
from dist_ft.search.candidates import Candidates, Outcome
from dist_ft.search.halving import Halving, plan_rungs
from dist_ft.search.keys import Candidate, KeySpace, Range, draw
from dist_ft.search.session import run_session
from dist_ft.search.study import KeyCodes, import_optuna
from dist_ft.search.writing import CHOSEN, TABLE, as_csv, metric_columns
from dist_ft.train.console import Console
from dist_ft.train.ending import DONE
from dist_ft.train.parts import make_parts
from dist_ft.train.segment import Place

Load = Callable[[Sequence[str]], Recipe]


@dataclass(frozen=True)
class TuneOptions:
    """What is searched and how much that may cost.

    Attributes:
        over: Ranges of keys as on the command line.
        trials: How many candidates begin, the recipe itself among them.
        budget: Share of the steps that training every candidate to the end would take.
    """

    over: tuple[str, ...]
    trials: int = 16
    budget: float = 0.35


@dataclass(frozen=True)
class Keys:
    """Sets of values as the subject of a search; all recipes were checked before it began."""

    recipes: dict[Candidate, Recipe]

    def describe(self, candidate: Candidate, /) -> str:
        """Return a candidate in words."""
        return candidate.describe()

    def run_name(self, candidate: Candidate, /) -> str:
        """Return the name of a candidate's run."""
        return f"trial-{candidate.number:03d}"

    def recipe_for(self, candidate: Candidate, /) -> Recipe:
        """Return the recipe that trains a candidate."""
        return self.recipes[candidate]


def tune(load: Load, *, options: TuneOptions, resume: bool) -> Outcome:
    """Find values of recipe keys by validation score; write table and recipe.

    Every rank calls it. All candidates are compared after a few steps, the better half goes on
    twice as far, and so on; whoever goes on continues from its checkpoint. The draws depend on the
    recipe's seed alone and the scores are in the search's journal, from which it can go on.

    Args:
        load: Returns the recipe with overrides.
        options: Ranges, trials, budget.
        resume: Go on with the search that is there.

    Raises:
        ValueError: If a range or the recipe of any candidate is wrong, or another search is in the
            folder.
        RuntimeError: If Optuna is not installed, or all candidates diverge.
    """
    import_optuna()
    base = load(())
    drawn = draw([Range.parse(o) for o in options.over], count=options.trials, seed=base.seed)
    keys = Keys({candidate: load(candidate.overrides) for candidate in drawn})

    def look(console: Console) -> tuple[int, tuple[int, ...]]:
        total = make_parts(base, console.say).total_steps
        return total, plan_rungs(
            len(drawn), total_steps=total, budget=options.budget, shortest=len(base.tasks)
        )

    def search(seen: tuple[int, tuple[int, ...]], place: Place, console: Console) -> Outcome:
        total, rungs = seen
        runs = Candidates(base, subject=keys, place=place, console=console)
        race: Halving[Candidate] = Halving(KeySpace(), rungs, runs.score, runs.drop, 0)
        described = {"over": list(options.over), "trials": options.trials}
        opened = runs.opened(
            {**described, "budget": options.budget},
            codes=KeyCodes(drawn), total_steps=total, resume=resume,
        )  # fmt: skip
        with opened:
            console.say(
                f"search: {len(drawn)} candidates, compared after {', '.join(map(str, rungs))} "
                "steps"
            )
            return _finish(race, race.halve(drawn), keys=keys, runs=runs)

    return run_session(base, look=look, search=search)


def _finish(
    race: Halving[Candidate], best: Candidate, *, keys: Keys, runs: Candidates[Candidate]
) -> Outcome:
    """Write table and chosen recipe, on rank 0."""
    if runs.record is None:
        return Outcome(DONE)
    runs.record.settle(best)
    rows: list[dict[str, Any]] = []
    for place, candidate in enumerate(race.ranking(), start=1):
        step = max(race.scores[candidate])
        facts = runs.record.facts(candidate)
        rows.append(
            {
                "place": place,
                "values": candidate.describe(),
                "steps": step,
                "score": race.scores[candidate][step].value,
                "loss": race.scores[candidate][step].loss,
                **metric_columns(facts.get("metrics", {}), recipe=keys.recipes[candidate]),
                "seconds": facts.get("seconds", 0.0),
            }
        )
    whole = len(race.scores) * race.rungs[-1]
    cost = (
        f"cost: {race.steps:,} steps, {100 * race.steps / whole:.1f} % of the {whole:,} steps of "
        f"training all {len(race.scores)} candidates to the end"
    )
    chosen = keys.recipes[best]
    body = chosen.model_copy(update={"name": f"{chosen.name}-chosen"})
    text = yaml.safe_dump(body.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    root = runs.folder.root
    note = f"# Chosen by dist-ft search for {chosen.name}: {best.describe()}.\n# {cost}\n"
    (root / CHOSEN).write_text(note + text, encoding="utf-8")
    (root / TABLE).write_text(as_csv(rows), encoding="utf-8")
    lines = ["| | values | steps | score | loss | seconds |", "|--:|---|--:|--:|--:|--:|"]
    lines += [
        f"| {r['place']} | {r['values']} | {r['steps']} | {r['score']:.4f} | {r['loss']:.4f} "
        f"| {r['seconds']:.0f} |"
        for r in rows
    ]
    table = "\n".join(lines)
    written = f"written: {root / CHOSEN}, {TABLE}"
    return Outcome(DONE, f"{table}\n\n{cost}\nchosen: {best.describe()}\n{written}")
