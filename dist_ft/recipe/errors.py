"""What is wrong with a recipe, as lines that a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dist_ft.recipe.reading import RawPath, value_at

# What `dist-ft import` writes where the other trainer's file says nothing.
TO_FILL = "FILL-IN"
_LONGEST_VALUE = 80


class RecipeError(ValueError):
    """A recipe can't be used.

    Attributes:
        errors: One line for each error, ``dotted.path: rule, value: remedy``.
    """

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = list(errors)
        super().__init__("\n".join(self.errors))


@dataclass(frozen=True)
class Finding:
    """One error at one place.

    Attributes:
        path: Keys and list indices from the top of the recipe.
        text: Rule, value and remedy.
    """

    path: RawPath
    text: str


def show_value(value: Any) -> str:
    """Return the value on one line, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def unfilled(raw: Any, *, path: RawPath = ()) -> Iterator[Finding]:
    """Yield a finding for each value that was left to be filled in."""
    items = (
        raw.items() if isinstance(raw, dict) else enumerate(raw if isinstance(raw, list) else ())
    )
    for key, value in items:
        if value == TO_FILL:
            yield Finding(
                (*path, key), f"is still {TO_FILL}, which the import could not tell: give it"
            )
        else:
            yield from unfilled(value, path=(*path, key))


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that was probably meant."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.55)
    return found[0] if found else None


def show_path(path: RawPath, raw: Any) -> str:
    """Return the path as it is written in an override; tasks go by their name if it is unique."""
    shown = ""
    for depth, key in enumerate(path):
        if isinstance(key, str):
            shown += f".{key}" if shown else key
        elif depth == 1 and path[0] == "tasks" and (name := _task_name(raw, key)):
            shown += f".{name}"
        else:
            shown += f"[{key}]"
    return shown or "recipe"


def as_lines(findings: Iterable[Finding], raw: Any) -> list[str]:
    """Return a line for each finding, in the order of the recipe's sections, without repeats."""
    order = list(raw) if isinstance(raw, dict) else []

    def place(finding: Finding) -> tuple[int, int]:
        section = finding.path[0] if finding.path else None
        index = finding.path[1] if len(finding.path) > 1 else 0
        known = order.index(section) if section in order else len(order)
        return known, index if isinstance(index, int) else 0

    lines = [
        f"{show_path(finding.path, raw)}: {finding.text}".replace("\n", " ")
        for finding in sorted(findings, key=place)
    ]
    return list(dict.fromkeys(lines))


def _task_name(raw: Any, index: int) -> str | None:
    tasks = value_at(raw, ("tasks",))
    if not isinstance(tasks, list):
        return None
    names = [value_at(task, ("name",)) for task in tasks]
    name = names[index] if index < len(names) else None
    usable = isinstance(name, str) and name.strip() and names.count(name) == 1
    return name if usable and "\n" not in str(name) else None
