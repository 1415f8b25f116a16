"""What a task's keys say about each other: labels and metrics."""

from __future__ import annotations

from collections.abc import Iterator

from dist_ft.config import Recipe, TaskConfig
from dist_ft.recipe.errors import Finding, closest, show_value
from dist_ft.recipe.reading import RawPath
from dist_ft.recipe.validate import Draft

# The tasks' own names: importing dist_ft.tasks would import torch, and a test compares the two.
METRICS: dict[str, tuple[str, ...]] = {
    "single_label": ("accuracy", "macro_f1", "mcc"),
    "multi_label": ("micro_f1", "macro_f1", "exact_match"),
    "image_classification": ("accuracy", "macro_f1", "mcc"),
    "audio_classification": ("accuracy", "macro_f1", "mcc"),
    "regression": ("mse", "mae", "pearson", "spearman"),
    "token_classification": ("f1", "precision", "recall", "token_accuracy", "macro_f1"),
    "question_answering": ("f1", "exact_match", "answerable_f1", "answerable_exact_match"),
    "generation": ("perplexity", "loss", "token_accuracy"),
    "generation with text": (
        "perplexity",
        "loss",
        "token_accuracy",
        "rouge_l",
        "rouge_1",
        "rouge_2",
        "bleu",
        "exact_match",
    ),
}


def check_tasks(draft: Draft, recipe: Recipe) -> Iterator[Finding]:
    """Yield labels that can't be meant and metrics that a task doesn't have."""
    for index, task in enumerate(recipe.tasks):
        if draft.is_sure("tasks", index, "type"):
            yield from _check_labels(draft, task=task, index=index)
            yield from _check_metric(draft, task=task, index=index)


def check_inputs(draft: Draft, recipe: Recipe) -> Iterator[Finding]:
    """Yield keys that mean nothing for what a task takes, and tasks that can't share a model."""
    if not draft.is_sure("tasks"):
        return
    others = [t.takes for t in recipe.tasks if t.takes != "text"]
    for index, task in enumerate(recipe.tasks):
        if getattr(task, "messages", None) is not None and task.augmentation:
            text = f"can't change conversations, and task {task.name} has messages: remove it"
            yield Finding(("tasks", index, "augmentation"), text)
        if others and task.takes != others[0]:
            text = (
                f"one model takes one of text, images and audio, and another task has {others[0]}"
            )
            yield Finding(("tasks", index, "type"), f"{text}: use two runs, got {task.type}")
        if task.takes == "text":
            continue
        given = {"max_length": task.max_length != 128, "augmentation": bool(task.augmentation)}
        for key in (key for key, is_given in given.items() if is_given):
            text = f"is about text, and task {task.name} has {task.takes}: remove it"
            yield Finding(("tasks", index, key), text)


def metrics_of(task: TaskConfig) -> tuple[str, ...]:
    """Return the metrics that a task reports, the deciding one first."""
    return METRICS[_kind(task)]


def _check_metric(draft: Draft, *, task: TaskConfig, index: int) -> Iterator[Finding]:
    keys = ("metric", "problem", "max_new_tokens")
    known = METRICS[_kind(task)]
    sure = all(draft.is_sure("tasks", index, key) for key in keys)
    if task.metric is None or task.metric in known or not sure:
        return
    meant = closest(task.metric, known)
    remedy = f"did you mean {meant}?" if meant else "use one of them"
    if task.metric in METRICS["generation with text"] and task.type == "generation":
        remedy = "set max_new_tokens, so that evaluation generates text"
    rule = f"must be one of {', '.join(known)}"
    yield Finding(("tasks", index, "metric"), f"{rule}, got {show_value(task.metric)}: {remedy}")


def _kind(task: TaskConfig) -> str:
    if task.type == "text_classification":
        return task.problem
    if task.type == "generation" and task.max_new_tokens > 0:
        return "generation with text"
    return task.type


def _check_labels(draft: Draft, *, task: TaskConfig, index: int) -> Iterator[Finding]:
    labels = getattr(task, "labels", None)
    path: RawPath = ("tasks", index, "labels")
    if labels is None or not draft.is_sure(*path):
        return
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        yield Finding(path, f"must differ, got {show_value(twice[0])} twice: remove one")
    if getattr(task, "problem", None) == "regression":
        yield Finding(path, f"a regression has none, got {show_value(labels)}: remove them")
    elif not labels:
        yield Finding(path, "must not be empty, got []: list the labels, or leave it out")
