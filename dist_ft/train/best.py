"""Which checkpoint is best and when a run has stopped to get better: per task, or for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from dist_ft import dist
from dist_ft.train.callbacks import Checkpoint, Watcher
from dist_ft.train.console import Console
from dist_ft.train.loop import Best, Run
from dist_ft.train.recorder import Recorder
from dist_ft.train.retention import worst_if_nan

DecideBy = Literal["each", "mean", "worst", "weighted"]


@dataclass(frozen=True)
class Decision:
    """Turns the tasks' scores into those that decide.

    Attributes:
        by: ``each`` task for itself, or their ``mean``, the ``worst`` of them, or their
            ``weighted`` mean.
        weights: Of the tasks in the weighted mean; 1 for others.
    """

    by: DecideBy = "each"
    weights: Mapping[str, float] | None = None

    def scores(self, of_tasks: Mapping[str, float]) -> dict[str, float]:
        """Return the deciding scores by name, larger is better; none if nothing was scored."""
        if self.by == "each" or not of_tasks:
            return dict(of_tasks)
        values = list(of_tasks.values())
        if self.by == "worst":
            return {self.name: min(values)}
        weights = [(self.weights or {}).get(task, 1.0) for task in of_tasks]
        if self.by == "mean":
            weights = [1.0] * len(values)
        total = sum(w * v for w, v in zip(weights, values, strict=True))
        return {self.name: total / sum(weights)}

    @property
    def name(self) -> str:
        """The name of the score that decides for all; other weights make another score."""
        if self.by != "weighted" or not self.weights:
            return self.by
        told = ", ".join(f"{task}: {weight:g}" for task, weight in sorted(self.weights.items()))
        return f"{self.by} ({told})"

    def name_for(self, task: str) -> str:
        """Return the name of the score that decides for `task`."""
        return task if self.by == "each" else self.name


def updated(
    best: Mapping[str, Best], *, scores: Mapping[str, float], step: int, min_delta: float
) -> dict[str, Best]:
    """Return the best scores after an evaluation, with how many in a row have not beaten them.

    Only of the names that are scored: where `evaluation.decide_by` was changed at a resume, those
    of before are never scored again, and would keep the run from ending.
    """
    if not scores:
        return dict(best)
    after: dict[str, Best] = {}
    for name, score in scores.items():
        before = best.get(name)
        if before is None or score > worst_if_nan(before["score"]) + min_delta:
            after[name] = {"score": score, "step": step, "stale": 0}
        else:
            after[name] = {**before, "stale": before["stale"] + 1}
    return after


@dataclass
class TrackBest(Watcher):
    """Follows the deciding scores; has the best saved, and ends a run that gets no better.

    Attributes:
        recorder: Where the end is told.
        console: Likewise.
        scores: Returns the deciding scores of a step; empty without an evaluation in it.
        checkpoint: Saves; comes after the evaluation. None if the best is not to be kept.
        patience: Evaluations in a row without a better score after which the run ends.
        min_delta: By how much a score must be better.
    """

    recorder: Recorder
    console: Console
    scores: Callable[[int], dict[str, float]]
    checkpoint: Checkpoint | None
    patience: int | None
    min_delta: float

    def on_fit_start(self, run: Run) -> None:
        """Let a run that had ended go on if it would not end by today's patience."""
        if run.progress.ended and not self._has_stopped(run.progress.best):
            run.progress.ended = False

    def _has_stopped(self, best: Mapping[str, Best]) -> bool:
        if self.patience is None or not best:
            return False
        return all(b["stale"] >= self.patience for b in best.values())

    def on_scores(self, run: Run) -> None:
        """Decide: rank 0 does, for all."""
        step = run.progress.step
        best = updated(
            run.progress.best, scores=self.scores(step), step=step, min_delta=self.min_delta
        )
        best = dist.broadcast_object(best)
        run.progress.best = best
        if self.checkpoint is not None and any(b["step"] == step for b in best.values()):
            self.checkpoint.is_due = True
        if step < run.total_steps and self._has_stopped(best):
            run.progress.ended = True
            self.recorder.event("early_stop", step=step, best=best)
            told = ", ".join(f"{n} {b['score']:.4g} at {b['step']}" for n, b in best.items())
            self.console.say(
                f"step {step}: stopped early, {self.patience} evaluations without a better score; "
                f"best: {told}"
            )
