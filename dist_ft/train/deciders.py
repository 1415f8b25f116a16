"""Connects a measuring freeze policy of a recipe with what it measures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from dist_ft.config import AdaptiveFreezing, PlateauFreezing, Recipe
from dist_ft.data.bandit import BanditMixture
from dist_ft.data.loader import eval_batches
from dist_ft.freezing.adaptive import PlateauPolicy, SettledPolicy
from dist_ft.model.trunk import group_modules
from dist_ft.recipe.task_checks import metrics_of
from dist_ft.train.adapt import (
    DecideByMeasurement,
    DecideByScore,
    Measure,
    RepresentationChange,
    gradient_norms,
    mean_score,
)
from dist_ft.train.callbacks import Evaluate, Watcher
from dist_ft.train.evaluate import Scores
from dist_ft.train.loop import Run
from dist_ft.train.mix import FollowLosses
from dist_ft.train.parts import Parts, eval_data

WATCHED_ROWS = 32


def deciders(recipe: Recipe, parts: Parts, evaluate: Evaluate) -> list[Watcher]:
    """Return the callbacks that let mixture and freeze policy decide; none for pure schedules.

    Raises:
        ValueError: If the freeze policy can't decide.
    """
    found = _freeze_deciders(recipe, parts, evaluate)
    if isinstance(parts.mixture, BanditMixture):
        names = [t.task.name for t in parts.tasks]
        own: Any = _OwnScores(evaluate)
        found.append(FollowLosses(parts.mixture, tasks=names, evaluate=own))
    return found


def _is_own(evaluate: Evaluate) -> bool:
    """Return whether the newest scores are those of one of the recipe's intervals.

    Others are for whoever looks on: at a run's end nothing is left to decide, and where a search
    compares its candidates a run as a whole has no scores, and must come to the same weights.
    """
    return bool(evaluate.every) and evaluate.done_at % evaluate.every == 0


class _OwnScores:
    """What a mixture sees of the evaluation."""

    def __init__(self, evaluate: Evaluate) -> None:
        self._evaluate = evaluate
        self.recorder = evaluate.recorder

    @property
    def last(self) -> dict[str, Scores]:
        """The newest scores; none if they are not its own."""
        return self._evaluate.last if _is_own(self._evaluate) else {}


class DecideByOwnScore(DecideByScore):
    """Shows a plateau policy the scores of the recipe's intervals, and no others."""

    def on_scores(self, run: Run) -> None:
        """Decide, if it is time to."""
        if _is_own(self.evaluate):
            super().on_scores(run)


def _freeze_deciders(recipe: Recipe, parts: Parts, evaluate: Evaluate) -> list[Watcher]:
    """Return the callbacks that let the freeze policy decide; none for a pure schedule.

    Raises:
        ValueError: If a plateau policy has no evaluation, or names a task or metric that is not
            there.
    """
    config, policy = recipe.freezing, parts.policy
    if isinstance(config, PlateauFreezing) and isinstance(policy, PlateauPolicy):
        if recipe.evaluation.every is None:
            raise ValueError(
                "freezing.policy: plateau needs scores during the run, but evaluation.every is not "
                "given: give it, for example evaluation.every: 0.5ep"
            )
        names = [d.task.name for d in evaluate.data]
        tasks = names if config.task is None else [config.task]
        _check_metric(config.metric, tasks, recipe)
        score = partial(mean_score, tasks=tasks, metric=config.metric)
        return [DecideByOwnScore(policy, evaluate, score)]
    if isinstance(config, AdaptiveFreezing) and isinstance(policy, SettledPolicy):
        measure: Measure = gradient_norms
        if config.signal == "plasticity":
            measure = _representation_change(recipe, parts, policy)
        every = max(1, parts.lengths.steps(config.every))
        return [DecideByMeasurement(policy, measure, every)]
    return []


def _check_metric(metric: str | None, tasks: Sequence[str], recipe: Recipe) -> None:
    for config in recipe.tasks:
        known = (*metrics_of(config), "loss")
        if metric is not None and config.name in tasks and metric not in known:
            raise ValueError(
                f"freezing.metric: task {config.name} does not report {metric!r}, only "
                f"{', '.join(known)}: choose one of them, or one task by freezing.task"
            )


def _representation_change(
    recipe: Recipe, parts: Parts, policy: SettledPolicy
) -> RepresentationChange:
    blocks = {
        g.name: group_modules(parts.model, g.parameters)[0]
        for g in parts.groups
        if g.kind == "block"
    }
    data = eval_data(recipe, parts, split="validation")[0]
    # The longest rows come first; every rank watches the same ones.
    batch = next(
        eval_batches(
            data.dataset,
            spec=data.spec,
            micro_batch_size=min(WATCHED_ROWS, len(data.dataset)),
            rank=0,
            world_size=1,
        )
    )
    return RepresentationChange(blocks, (data.task.name, batch), policy)
