"""Runs a search: trains candidates in turn on all ranks and writes what was found."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_ft import dist
from dist_ft.config import Recipe, StaticFreezing
from dist_ft.freezing.schedule import LayerOrder
from dist_ft.search.blocks import Block, Space, make_space
from dist_ft.search.halving import Race, Score, make_race
from dist_ft.search.study import SearchRecord, import_optuna
from dist_ft.search.writing import Findings, write_findings
from dist_ft.train.build import DONE, PREEMPTED, check_world
from dist_ft.train.console import Console
from dist_ft.train.freeze_plan import COMMON, as_patterns
from dist_ft.train.parts import make_parts
from dist_ft.train.run_folder import RunFolder
from dist_ft.train.segment import Place, PreemptedError, Segment, on_main, train_until
from dist_ft.train.signals import StopRequest


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
class Outcome:
    """How a search ended.

    Attributes:
        exit_code: 0, or 75 if it was stopped and can go on.
        table: All candidates as markdown, with the cost; only on rank 0 and at the end.
    """

    exit_code: int
    table: str | None = None


class SearchFolder(RunFolder):
    """Paths inside ``<output_dir>/<name>-search``."""

    @property
    def recipe(self) -> Path:
        """The recipe and the options of the search.

        Under a run's name the folder would pass for a run that can be evaluated and exported.
        """
        return self.root / "search.json"

    @property
    def runs(self) -> Path:
        """The candidates' runs."""
        return self.root / "runs"


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
        RuntimeError: If Optuna is not installed.
    """
    import_optuna()  # on every rank, so that all of them end if it is missing
    stop = StopRequest()
    with stop.listening():
        world = dist.world_from_environment()
        check_world(recipe, world)
        console = Console(main=world.is_main)
        model = _look_at(recipe, console)
        space = model.space(options.granule)
        device = dist.init_process_group(
            world,
            timeout_s=recipe.engine.collective_timeout_s,
            join_timeout_s=recipe.engine.join_timeout_s,
        )
        try:
            place = Place(world, device, stop_signal=lambda: stop.signal)
            searcher = Searcher(recipe, model=model, place=place, console=console)
            race = make_race(
                space,
                total_steps=model.total_steps,
                budget=options.budget,
                shortest=len(recipe.tasks),
                score=searcher.score,
                drop=searcher.drop,
            )
            searcher.open(options, resume=resume)
            return searcher.run(race)
        except PreemptedError:
            console.say("stopped after saving; start the same command with --resume to go on")
            return Outcome(PREEMPTED)
        finally:
            dist.shut_down()


def _look_at(recipe: Recipe, console: Console) -> Model:
    """Return what a search must know of the model, without keeping it."""
    parts = make_parts(recipe, console.say)
    numel = {name: p.numel() for name, p in parts.model.named_parameters()}
    return Model(
        order=LayerOrder.of([(g.name, g.freezing_kind) for g in parts.groups]),
        sizes={g.name: sum(numel[n] for n in g.trained) for g in parts.groups},
        total_steps=parts.total_steps,
    )


class Searcher:
    """Trains blocks on all ranks and remembers their scores on rank 0."""

    def __init__(self, recipe: Recipe, *, model: Model, place: Place, console: Console) -> None:
        """Search for `recipe`; `open` comes next."""
        self._recipe, self._model, self._place = recipe, model, place
        self._console = console
        self._folder = SearchFolder(recipe.output_dir / f"{recipe.name}-search")
        self._record: SearchRecord | None = None

    def open(self, options: SearchOptions, *, resume: bool) -> None:
        """Make the folder and the record, or open those of the search that goes on.

        Raises:
            ValueError: If the folder holds a search that is not to be resumed or is another one.
        """

        def open_folder() -> None:
            body = self._recipe.model_dump(mode="json")
            self._folder.start({**body, "search": vars(options)}, resume=resume)

        on_main(open_folder)
        self._folder.log_to_file(self._place.world)
        if self._place.world.is_main:
            self._record = SearchRecord(
                self._folder.root,
                name=f"{self._recipe.name}-search",
                blocks=len(self._model.order.blocks),
                total_steps=self._model.total_steps,
            )

    def run(self, race: Race) -> Outcome:
        """Search, and write what was found."""
        entrants = len(race.space.grid(race.space.granules()[0]))
        self._console.say(
            f"search: {entrants} candidates, compared after {', '.join(map(str, race.rungs))} "
            f"steps; they take the place of freezing.policy {self._recipe.freezing.policy}"
        )
        best = race.run()
        if self._record is None:
            return Outcome(DONE)
        self._record.settle(best)
        findings = Findings(
            race=race,
            recipe=self._recipe,
            chosen=self._recipe_for(best, chosen=True),
            trainable_params={b: self._model.trainable_params(b) for b in race.scores},
            total_params=sum(self._model.sizes.values()),
            facts={b: self._record.facts(b) for b in race.scores},
        )
        return Outcome(DONE, write_findings(findings, folder=self._folder.root))

    def score(self, block: Block, step: int) -> Score:
        """Return what `block` scores on validation after `step` steps, the same on every rank."""
        known = self._record.score(block, step) if self._record else None
        known = dist.broadcast_object(known)
        if known is not None:
            return known
        segment = train_until(self._recipe_for(block), step=step, place=self._place)
        self._write_down(block, step, segment)
        return _score(segment)

    def _write_down(self, block: Block, step: int, segment: Segment) -> None:
        name = block.describe(len(self._model.order.blocks))
        self._console.say(
            f"search: {name}: {segment.score:.4f} after {step} steps ({segment.seconds:.1f} s)"
        )
        if self._record is not None:
            before = self._record.facts(block).get("seconds", 0.0)
            facts = {"metrics": segment.metrics, "seconds": round(before + segment.seconds, 3)}
            self._record.record(block, step, score=_score(segment), facts=facts)

    def drop(self, block: Block) -> None:
        """Give a block up and free its checkpoints; its record and metrics stay."""
        if self._record is not None:
            self._record.settle(block)
            folder = self._recipe_for(block).output_dir / _run_name(block)
            shutil.rmtree(RunFolder(folder).checkpoints, ignore_errors=True)

    def _recipe_for(self, block: Block, *, chosen: bool = False) -> Recipe:
        """Return the recipe that trains `block`: a candidate's, or the one to hand out."""
        base = self._recipe
        common: dict[str, Any] = {name: getattr(base.freezing, name) for name in COMMON}
        freezing = StaticFreezing(
            policy="static",
            trainable=as_patterns(block.trainable(self._model.order)),
            **common,
        )
        if chosen:
            changes: dict[str, Any] = {"name": f"{base.name}-chosen"}
        else:
            changes = {
                "name": _run_name(block),
                "output_dir": self._folder.runs,
                # A candidate is scored where it is compared, and only its newest state matters.
                "evaluation": base.evaluation.model_copy(update={"every": None}),
                "checkpoint": base.checkpoint.model_copy(update={"keep_last": 1}),
            }
        return base.model_copy(update={**changes, "freezing": freezing})


def _run_name(block: Block) -> str:
    return f"blocks-{block.lo:02d}-{block.hi:02d}"


def _score(segment: Segment) -> Score:
    losses = [metrics["loss"] for metrics in segment.metrics.values()]
    return Score(segment.score, sum(losses) / len(losses))
