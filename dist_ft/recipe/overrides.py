"""Overrides on the command line: ``a.b=c`` changes the recipe as if it were written there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dist_ft.recipe.errors import Finding, closest, show_value
from dist_ft.recipe.reading import parse_yaml

_INDEX = re.compile(r"\[(\d+)\]")


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> list[Finding]:
    """Change the recipe in place and return what could not be applied.

    Args:
        raw: The recipe as plain dicts and lists.
        overrides: ``path=value`` each; list items by index or, for tasks, by name; the value is
            YAML.
    """
    findings: list[Finding] = []
    for override in overrides:
        try:
            _apply(raw, override)
        except ValueError as error:
            findings.append(Finding((f"override {override!r}",), str(error)))
    return findings


def _apply(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = _INDEX.sub(r".\1", path.strip()).split(".")
    if not equals or not all(keys):
        raise ValueError("must be key=value: write it like optim.lr=2e-5")
    document = parse_yaml(text, name="value")
    if document.problems:
        raise ValueError(document.problems[0][1])
    parent: Any = raw
    while len(keys) > 1:
        parent, keys = _descend(parent, keys)
    _assign(parent, keys[0], document.value)


def _assign(parent: Any, key: str, value: Any) -> None:
    if isinstance(parent, list):
        parent[_index(parent, key)] = value
    elif isinstance(parent, dict):
        parent[key] = value
    else:
        raise ValueError(f"{key!r} lies under {show_value(parent)}: replace the whole section")


def _descend(parent: Any, keys: list[str]) -> tuple[Any, list[str]]:
    """Return the section under the first key, and the other keys."""
    if isinstance(parent, list):
        return parent[_index(parent, keys[0])], keys[1:]
    if not isinstance(parent, dict):
        raise ValueError(f"{keys[0]!r} lies under {show_value(parent)}: replace the whole section")
    if parent.get(keys[0]) is None:
        parent[keys[0]] = {}
    return parent[keys[0]], keys[1:]


def _by_name(items: list[Any], name: str) -> int | None:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    return names.index(name) if name in names else None


def _index(items: list[Any], key: str) -> int:
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    named = _by_name(items, key)
    if named is not None:
        return named
    names = [str(item["name"]) for item in items if isinstance(item, dict) and "name" in item]
    meant = closest(key, names)
    known = f"did you mean {meant}?" if meant else f"there are {len(items)} ({', '.join(names)})"
    raise ValueError(f"no item {key!r}: {known}")
