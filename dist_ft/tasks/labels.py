"""Label names: found in the training data or given, and their indices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

_MOST_LABELS = 1000


class FoundLabels(tuple[str, ...]):
    """Labels that were found in the training rows: their order says nothing of class numbers."""

    __slots__ = ()


def label_name(value: Any) -> str:
    """Returns a raw label value as a label name: text as it is, numbers and booleans as text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool | int | str):
        return str(value)
    if isinstance(value, float) and value.is_integer():  # an integer column with gaps, read as csv
        return str(int(value))
    raise ValueError(f"a label must be text, an integer or a boolean, got {value!r}")


def discover_labels(names: Iterable[str], *, task: str) -> list[str]:
    """Returns the different label names in a fixed order: integers by value, others by text.

    Raises:
        ValueError: there are fewer than two, or so many that the column holds no labels.
    """
    found: set[str] = set()
    for name in names:
        found.add(name)
        if len(found) > _MOST_LABELS:
            raise ValueError(
                f"tasks.{task}.label: more than {_MOST_LABELS} different labels, such as {name!r}; "
                "name the label column, use problem: regression, or list the labels"
            )
    if len(found) < 2:
        raise ValueError(
            f"tasks.{task}.label: the training data has {len(found)} different labels "
            f"({', '.join(sorted(found))}), a classifier needs at least 2"
        )
    return sorted(found, key=_by_value)


def _by_value(name: str) -> tuple[int, int, str]:
    digits = name.removeprefix("-")
    return (0, int(name), name) if digits.isdecimal() and digits.isascii() else (1, 0, name)


def label_index(value: Any, *, labels: Sequence[str], task: str) -> int:
    """Returns the index of a raw label value.

    An integer counts as an index where the recipe lists names, as in data sets with class numbers.

    Raises:
        ValueError: the label is not known, or a number beside names in an order of their own.
    """
    name = label_name(value)
    if name in labels:
        return labels.index(name)
    known = ", ".join(labels[:10]) + (" ..." if len(labels) > 10 else "")
    numbered = any(label.isdecimal() for label in labels)
    if not numbered and name.isdecimal() and int(name) < len(labels):
        if not isinstance(labels, FoundLabels):
            return int(name)
        raise ValueError(
            f"label {name!r} is a number where the training rows have names ({known}): list "
            f"tasks.{task}.labels in the order of the numbers"
        )
    raise ValueError(
        f"label {name!r} is not known (known: {known}; tasks.{task}.labels may list others)"
    )


def known_labels(labels: Sequence[str] | None, *, task: str) -> tuple[str, ...]:
    """Returns the labels.

    Raises:
        ValueError: they were neither given nor found in the training data yet.
    """
    if labels is None:
        raise ValueError(
            f"tasks.{task}.labels: the labels are not known yet; scan the training data, or give "
            "the list"
        )
    return labels if isinstance(labels, tuple) else tuple(labels)


def check_labels(labels: Sequence[str] | None, *, task: str) -> None:
    """Checks a given list of labels.

    Raises:
        ValueError: there are fewer than two, or one comes twice.
    """
    if labels is None:
        return
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ValueError(
            f"tasks.{task}.labels: needs at least two different labels, each once, got "
            f"{list(labels)}"
        )


def label_config(labels: Sequence[str]) -> dict[str, Any]:
    """Returns the configuration values that name the labels."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: index for index, name in enumerate(labels)},
    }
