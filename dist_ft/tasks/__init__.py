"""Tasks: what a head learns, from raw rows to metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dist_ft.tasks.audio_classification import AudioClassification
from dist_ft.tasks.base import LossSum, Metrics, Task
from dist_ft.tasks.generation import Generation
from dist_ft.tasks.image_classification import ImageClassification
from dist_ft.tasks.question_answering import QuestionAnswering
from dist_ft.tasks.text_classification import TextClassification
from dist_ft.tasks.token_classification import TokenClassification

__all__ = ["TASKS", "LossSum", "Metrics", "Task", "TokenClassification", "build_task"]

_CLASSES = (
    TextClassification,
    TokenClassification,
    QuestionAnswering,
    Generation,
    ImageClassification,
    AudioClassification,
)
TASKS = {task_class.type: task_class for task_class in _CLASSES}


def build_task(settings: Mapping[str, Any]) -> Task:
    """Returns the task of a recipe's settings.

    Args:
        settings: ``type``, a key of ``TASKS``, and fields of the task's class, ``name`` at least.

    Raises:
        ValueError: the type or a setting is not known, or a setting's value is not possible.
    """
    kind, options = settings.get("type"), {k: v for k, v in settings.items() if k != "type"}
    if kind not in TASKS:
        raise ValueError(f"tasks: type {kind!r} is not one of {', '.join(TASKS)}")
    known = [field.name for field in fields(TASKS[kind])]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"tasks: {kind} has no setting {unknown[0]!r}; its settings are {', '.join(known)}"
        )
    return TASKS[kind](**options)
