"""Runs a search: trains candidates in turn on all ranks and writes what was found."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from dist_ft.config import Recipe, StaticFreezing
from dist_ft.freezing.schedule import LayerOrder
from dist_ft.search.blocks import Block, Space, make_space
from dist_ft.search.candidates import Candidates, Outcome
from dist_ft.search.halving import Race, make_race
from dist_ft.search.session import run_session
from dist_ft.search.study import BlockCodes
from dist_ft.search.writing import Findings, write_findings
from dist_ft.train.console import Console
from dist_ft.train.ending import DONE
from dist_ft.train.freeze_plan import COMMON, as_patterns
from dist_ft.train.parts import make_parts
from dist_ft.train.segment import Place


@dataclass(frozen=True)
class SearchOptions:
    """How much a search may cost and how finely it looks.

    Attributes:
        budget: Share of the steps that training every candidate to the end would take.
        granule: A trainable block begins and ends at multiples of this many transformer blocks.
    """

    budget: float = 0.35
    granule: int = 1


@dataclass(frozen=True)
class Model:
    """What a search knows of the model: its layer groups and their parameters."""

    order: LayerOrder
    sizes: dict[str, int]
    total_steps: int

    def space(self, granule: int) -> Space:
        """Return the candidates."""
        return make_space([self.sizes[name] for name in self.order.blocks], granule=granule)

    def trainable_params(self, block: Block) -> int:
        """Return the number of elements that train."""
        return sum(self.sizes[name] for name in block.trainable(self.order))


def search(recipe: Recipe, *, options: SearchOptions, resume: bool) -> Outcome:
    """Find the contiguous blocks to train by validation score; write table, plot and recipe.

    Every rank calls it. Candidates are whole runs in ``<output_dir>/<name>-search/runs``; those
    that go on from rung to rung continue from their checkpoints.

    Args:
        recipe: The run to find a freezing for; its own freezing policy is not used.
        options: Budget and granularity.
        resume: Go on with the search that is there.

    Raises:
        ValueError: If recipe, model and options do not fit, or another search is in the folder.
        RuntimeError: If Optuna is not installed, or all candidates diverge.
    """

    def look(console: Console) -> tuple[Model, Space]:
        model = _look_at(recipe, console)
        return model, model.space(options.granule)

    def run(seen: tuple[Model, Space], place: Place, console: Console) -> Outcome:
        model, space = seen
        searcher = Searcher(recipe, model=model, place=place, console=console)
        race = make_race(
            space,
            total_steps=model.total_steps,
            budget=options.budget,
            shortest=len(recipe.tasks),
            score=searcher.score,
            drop=searcher.drop,
        )
        with searcher.opened(options, resume=resume):
            return searcher.run(race)

    return run_session(recipe, look=look, search=run)


def _look_at(recipe: Recipe, console: Console) -> Model:
    """Return what a search must know of the model, without keeping it."""
    parts = make_parts(recipe, console.say)
    numel = {name: p.numel() for name, p in parts.model.named_parameters()}
    return Model(
        order=LayerOrder.of([(g.name, g.freezing_kind) for g in parts.groups]),
        sizes={g.name: sum(numel[n] for n in g.trained) for g in parts.groups},
        total_steps=parts.total_steps,
    )


@dataclass(frozen=True)
class Blocks:
    """Blocks as the subject of a search."""

    recipe: Recipe
    model: Model

    def describe(self, block: Block, /) -> str:
        """Return a block in words."""
        return block.describe(len(self.model.order.blocks))

    def run_name(self, block: Block, /) -> str:
        """Return the name of a block's run."""
        return f"blocks-{block.lo:02d}-{block.hi:02d}"

    def recipe_for(self, block: Block, /) -> Recipe:
        """Return the recipe that trains a block."""
        base = self.recipe
        common: dict[str, Any] = {name: getattr(base.freezing, name) for name in COMMON}
        freezing = StaticFreezing(
            policy="static",
            trainable=as_patterns(block.trainable(self.model.order)),
            **common,
        )
        return base.model_copy(update={"freezing": freezing})


class Searcher:
    """Looks for the best block and writes what was found."""

    def __init__(self, recipe: Recipe, *, model: Model, place: Place, console: Console) -> None:
        """Search for `recipe`; `opened` comes next."""
        self._recipe, self._model, self._console = recipe, model, console
        self._subject = Blocks(recipe, model)
        self._candidates = Candidates(recipe, subject=self._subject, place=place, console=console)
        self.score, self.drop = self._candidates.score, self._candidates.drop

    def opened(self, options: SearchOptions, *, resume: bool) -> AbstractContextManager[None]:
        """Return what holds folder and record, see `Candidates.opened`."""
        return self._candidates.opened(
            dict(vars(options)),
            codes=BlockCodes(len(self._model.order.blocks)),
            total_steps=self._model.total_steps,
            resume=resume,
        )

    def run(self, race: Race) -> Outcome:
        """Search, and write what was found."""
        entrants = len(race.space.grid(race.space.granules()[0]))
        self._console.say(
            f"search: {entrants} candidates, compared after {', '.join(map(str, race.rungs))} "
            f"steps; they take the place of freezing.policy {self._recipe.freezing.policy}"
        )
        best = race.run()
        record = self._candidates.record
        if record is None:
            return Outcome(DONE)
        record.settle(best)
        chosen = self._subject.recipe_for(best)
        findings = Findings(
            race=race,
            recipe=self._recipe,
            chosen=chosen.model_copy(update={"name": f"{self._recipe.name}-chosen"}),
            trainable_params={b: self._model.trainable_params(b) for b in race.scores},
            total_params=sum(self._model.sizes.values()),
            facts={b: record.facts(b) for b in race.scores},
        )
        return Outcome(DONE, write_findings(findings, folder=self._candidates.folder.root))
