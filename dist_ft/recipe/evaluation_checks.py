"""Deciding scores that can't be compared, and adapters beside what they leave no use for."""

from __future__ import annotations

from collections.abc import Iterator

from dist_ft.config import Recipe
from dist_ft.recipe.errors import Finding, closest
from dist_ft.recipe.task_checks import metrics_of
from dist_ft.recipe.validate import Draft

# Metrics between 0 and 1 (mcc and correlations: at most 1): means of them mean something.
_UNBOUNDED = ("perplexity", "loss", "mse", "mae")


def check_evaluation(draft: Draft, recipe: Recipe) -> Iterator[Finding]:
    """Return what makes no sense in how the best evaluation is found."""
    if not draft.is_sure("evaluation") or not draft.is_sure("tasks"):
        return
    evaluation = recipe.evaluation
    names = [task.name for task in recipe.tasks]
    for name in evaluation.weights:
        if name not in names:
            meant = closest(name, names)
            remedy = f"did you mean {meant}?" if meant else f"use one of {', '.join(names)}"
            text = f"must be the name of a task: {remedy}"
            yield Finding(("evaluation", "weights", name), text)
    if evaluation.weights and evaluation.decide_by != "weighted":
        text = f"are of no use with decide_by {evaluation.decide_by}: set it to weighted"
        yield Finding(("evaluation", "weights"), text)
    if evaluation.early_stopping is not None and evaluation.every is None:
        text = "needs scores while training goes on: set evaluation.every"
        yield Finding(("evaluation", "early_stopping"), text)
    if evaluation.decide_by == "each" or len(recipe.tasks) == 1:
        return
    for name, deciding in _unbounded(recipe):
        text = (
            f"{evaluation.decide_by} compares scores between 0 and 1, and task {name} is "
            f"decided by {deciding}: give it another metric, or use decide_by each"
        )
        yield Finding(("evaluation", "decide_by"), text)


def _unbounded(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield the tasks whose deciding metrics have no bound, and these metrics."""
    for task in recipe.tasks:
        deciding = task.metric or metrics_of(task)[0]
        if deciding in _UNBOUNDED:
            yield task.name, deciding


def check_ranking(recipe: Recipe) -> None:
    """Check that runs of a recipe can be ranked by one score, as a search does.

    Raises:
        ValueError: If that would be a mean of scores that can't be added.
    """
    if len(recipe.tasks) == 1 or recipe.evaluation.decide_by != "each":
        return
    for name, deciding in _unbounded(recipe):
        raise ValueError(
            f"evaluation.decide_by: a search ranks by one score, for each the mean over the tasks, "
            f"and task {name} is decided by {deciding}, which has no bound: give it another metric "
            "by tasks.metric, or search with one task"
        )


def check_lora(draft: Draft, recipe: Recipe) -> Iterator[Finding]:
    """Return what adapters make impossible."""
    if recipe.model.lora is None or not draft.is_sure("model"):
        return
    if recipe.regularization.reinitialize_blocks and draft.is_sure("regularization"):
        text = "gives blocks random weights that never train beside model.lora: remove one of them"
        yield Finding(("regularization", "reinitialize_blocks"), text)
