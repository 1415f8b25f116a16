"""Trains the candidates of a search in turn on all ranks, and remembers what they scored."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from dist_ft import dist
from dist_ft.config import Recipe
from dist_ft.freezing.activation_cache import cache_folder
from dist_ft.search.halving import DIVERGED, Score
from dist_ft.search.study import Codes, SearchRecord
from dist_ft.train.console import Console
from dist_ft.train.numbers import BadNumbersError
from dist_ft.train.run_folder import RunFolder, scores_decide
from dist_ft.train.run_lock import RunLock
from dist_ft.train.segment import Place, Segment, train_until
from dist_ft.train.shared_folder import check_shared

C = TypeVar("C")
C_contra = TypeVar("C_contra", contravariant=True)


class Subject(Protocol[C_contra]):
    """What a search is about: how a candidate is named and trained."""

    def recipe_for(self, candidate: C_contra, /) -> Recipe:
        """Return the recipe that trains a candidate, to the end."""
        ...

    def run_name(self, candidate: C_contra, /) -> str:
        """Return the name of a candidate's run."""
        ...

    def describe(self, candidate: C_contra, /) -> str:
        """Return a candidate in words."""
        ...


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

    def free_on_resume(self, recipe: Mapping[str, Any]) -> set[str]:
        """Return what may change as the search goes on: not by what its candidates are ranked."""
        free = super().free_on_resume(recipe)
        if "evaluation" in free:
            free.remove("evaluation")
            free |= {f"evaluation.{k}" for k in ("every", "micro_batch_size", "early_stopping")}
        return free


class Candidates(Generic[C]):
    """Trains candidates on all ranks and remembers their scores on rank 0."""

    def __init__(
        self, recipe: Recipe, *, subject: Subject[C], place: Place, console: Console
    ) -> None:
        """Search for `recipe`; `opened` comes next."""
        self.folder = SearchFolder(recipe.output_dir / f"{recipe.name}-search")
        self.record: SearchRecord[C] | None = None
        self._recipe, self._subject = recipe, subject
        self._place, self._console = place, console

    @contextmanager
    def opened(
        self, options: dict[str, Any], *, codes: Codes[C], total_steps: int, resume: bool
    ) -> Iterator[None]:
        """Hold the folder and the record, new ones or those of the search that goes on.

        Args:
            options: Of the search; another search may not go on in its folder.
            codes: How the record writes candidates.
            total_steps: Length of a whole run.
            resume: Go on with the search that is there.

        Raises:
            ValueError: If the folder holds a search that is not to be resumed or is another one,
                if another search writes it, or if it is not one folder for all ranks.
        """

        def open_folder() -> None:
            body = self._recipe.model_dump(mode="json")
            self.folder.start({**body, "search": options}, resume=resume)

        lock = RunLock(self.folder.root)
        try:
            dist.on_main(lock.acquire)
            check_shared(self.folder.root)
            dist.on_main(open_folder)
            with self.folder.logging_to_file(self._place.world):
                self._open_record(codes, total_steps=total_steps)
                yield
        finally:
            lock.release()

    def _open_record(self, codes: Codes[C], *, total_steps: int) -> None:
        if self._place.world.is_main:
            self.record = SearchRecord(
                self.folder.root,
                name=f"{self._recipe.name}-search",
                codes=codes,
                total_steps=total_steps,
            )

    def score(self, candidate: C, step: int) -> Score:
        """Return what `candidate` scores on validation after `step` steps, the same everywhere.

        A candidate whose numbers stay bad before that has diverged: its score is no number.
        """
        known = self.record.score(candidate, step) if self.record else None
        known = dist.broadcast_object(known)
        if known is not None:
            return known
        began = time.monotonic()
        try:
            segment = train_until(self._candidate_recipe(candidate), step=step, place=self._place)
        except BadNumbersError as error:  # raised by every rank
            seconds = time.monotonic() - began
            self._say(candidate, f"diverged before {step} steps ({error})", seconds=seconds)
            self._record(candidate, step, DIVERGED, seconds=seconds)
            return DIVERGED
        said = f"{segment.score:.4f} after {step} steps"
        self._say(candidate, said, seconds=segment.seconds)
        score = _score(segment)
        self._record(candidate, step, score, seconds=segment.seconds, metrics=segment.metrics)
        return score

    def _say(self, candidate: C, what: str, *, seconds: float) -> None:
        self._console.say(f"search: {self._subject.describe(candidate)}: {what} ({seconds:.1f} s)")

    def _record(
        self, candidate: C, step: int, score: Score, *, seconds: float, **facts: Any
    ) -> None:
        if self.record is not None:
            before = self.record.facts(candidate).get("seconds", 0.0)
            facts["seconds"] = round(before + seconds, 3)
            self.record.record(candidate, step, score=score, facts=facts)

    def drop(self, candidate: C) -> None:
        """Give a candidate up and free its checkpoints and caches; record and metrics stay."""
        recipe = self._candidate_recipe(candidate)
        folder = RunFolder(recipe.output_dir / recipe.name)
        # By every rank: each host may have its cache on a disk of its own.
        cache = cache_folder(folder.root, elsewhere=recipe.cache.dir)
        shutil.rmtree(cache, ignore_errors=True)
        if self.record is not None:
            self.record.settle(candidate)
            shutil.rmtree(folder.checkpoints, ignore_errors=True)

    def _candidate_recipe(self, candidate: C) -> Recipe:
        recipe = self._subject.recipe_for(candidate)
        decide = scores_decide(recipe.model_dump(mode="json"))
        every = recipe.evaluation.every if decide else None
        changes = {
            "name": self._subject.run_name(candidate),
            "output_dir": self.folder.runs,
            # A candidate is scored where it is compared, and only its newest state matters. Scores
            # in between are for what they decide; when a candidate ends is for the search.
            "evaluation": recipe.evaluation.model_copy(
                update={"every": every, "early_stopping": None}
            ),
            "checkpoint": recipe.checkpoint.model_copy(update={"keep_last": 1}),
        }
        return recipe.model_copy(update=changes)


def _score(segment: Segment) -> Score:
    losses = [metrics["loss"] for metrics in segment.metrics.values()]
    return Score(segment.score, sum(losses) / len(losses))
