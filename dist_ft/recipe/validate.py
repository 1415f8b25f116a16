"""Validation of a recipe that finds every error at once and says how to repair each."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dist_ft.config import Recipe
from dist_ft.recipe.errors import Finding, closest, show_value
from dist_ft.recipe.reading import RawPath, value_at
from dist_ft.recipe.schema import Location, Place, homes_of_key, locate

_MOST_ROUNDS = 30
# A stand-in that fails again and again: the section around it gets one.
_MOST_ATTEMPTS = 2
_BOUNDS: dict[str, tuple[str, str]] = {
    "greater_than": ("greater than {gt:g}", "raise it"),
    "greater_than_equal": ("at least {ge:g}", "raise it"),
    "less_than": ("less than {lt:g}", "lower it"),
    "less_than_equal": ("at most {le:g}", "lower it"),
    "multiple_of": ("a multiple of {multiple_of:g}", "round it"),
}


@dataclass
class Draft:
    """What can be checked further although parts of the recipe are wrong.

    Attributes:
        recipe: The valid parts, with stand-ins for the others; None if nothing could be saved.
        findings: The errors so far.
        doubtful: Places whose value is a stand-in, so that nothing can be said about them.
    """

    recipe: Recipe | None = None
    findings: list[Finding] = field(default_factory=list)
    doubtful: set[RawPath] = field(default_factory=set)

    def is_sure(self, *path: str | int) -> bool:
        """Return whether the recipe itself says what stands at a place."""
        return not any(path[:end] in self.doubtful for end in range(len(path) + 1))


def validate(raw: dict[str, Any]) -> Draft:
    """Return the recipe with all findings of the schema.

    pydantic skips the checks of a section in which anything is wrong, so what is wrong is reported,
    replaced by a stand-in and the rest validated again until nothing new turns up.
    """
    draft = Draft()
    repaired: dict[str, Any] = copy.deepcopy(raw)
    attempts: Counter[RawPath] = Counter()
    for _ in range(_MOST_ROUNDS):
        try:
            # From JSON the strict mode refuses 1 for true and "16" for 16, yet takes text as path.
            draft.recipe = Recipe.model_validate_json(json.dumps(repaired), strict=True)
            break
        except ValidationError as error:
            _learn(error, raw=repaired, draft=draft, attempts=attempts)
    return draft


def _learn(
    error: ValidationError, *, raw: dict[str, Any], draft: Draft, attempts: Counter[RawPath]
) -> None:
    repairs: list[Callable[[], None]] = []
    for details in error.errors(include_url=False):
        location = locate(details["loc"])
        if not _fits_variant(location, raw):
            continue
        path = location.path
        if draft.is_sure(*path) and not _follows_from_stand_in(details, path, draft):
            draft.findings.append(_finding(details, location, raw))
        if details["type"] == "extra_forbidden":
            repairs.append(lambda path=path: _delete(raw, path))
            continue
        suspects = _suspects(details, location, attempts=attempts)
        draft.doubtful.update(suspect.path for suspect in suspects if suspect.path)
        repairs.extend(
            lambda suspect=suspect: _stand_in(raw, suspect, attempts=attempts)
            for suspect in suspects
        )
    for repair in repairs:
        repair()


def _suspects(
    details: ErrorDetails, location: Location, *, attempts: Counter[RawPath]
) -> list[Location]:
    """Return the places that an error accuses: of a whole section, the keys that it speaks of."""
    path, place = location.path, location.place
    if place.tags:
        attempts[path] += 1
        return [Location((*path, str(place.discriminator)), place, place, location.variants)]
    if details["type"] != "value_error" or not place.is_section or attempts[path] or not path:
        return [location]
    attempts[path] += 1
    words = _words(details["msg"])
    children = [
        Location((*path, key), place.child(key), place, location.variants)
        for key in place.keys
        if key in words
    ]
    return children or [location]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def _fits_variant(location: Location, raw: Any) -> bool:
    """Return whether the error is about the union member that the author meant."""
    return all(
        isinstance(value_at(raw, path), dict | str) == is_section
        for path, is_section in location.variants
    )


def _follows_from_stand_in(details: ErrorDetails, path: RawPath, draft: Draft) -> bool:
    """Return whether a check of a whole section speaks of a key that has a stand-in."""
    if details["type"] != "value_error" or not isinstance(details["input"], dict):
        return False
    doubtful = {doubt[-1] for doubt in draft.doubtful if doubt and doubt[:-1] == path}
    return not doubtful.isdisjoint(_words(details["msg"]))


def _stand_in(raw: dict[str, Any], suspect: Location, *, attempts: Counter[RawPath]) -> None:
    """Replace what is wrong by something valid; harder with each attempt at the same place."""
    path, place = suspect.path, suspect.place
    attempts[path] += 1
    if not path:
        _rename_tasks(raw)
    elif place.tags:
        section = value_at(raw, path[:-1])
        keep = section if isinstance(section, dict) and attempts[path] == 1 else {}
        _put(raw, path[:-1], _example(place, keep=keep))
    elif attempts[path] > _MOST_ATTEMPTS:
        _put(raw, path[:-1], _example(suspect.parent, keep={}))
    elif place.required or isinstance(path[-1], int):
        _put(raw, path, _example(place, keep={}))
    else:
        _delete(raw, path)


def _rename_tasks(raw: dict[str, Any]) -> None:
    """Make the task names differ; nothing else is checked for the recipe as a whole."""
    for index, task in enumerate(raw.get("tasks") or []):
        if isinstance(task, dict) and isinstance(task.get("name"), str):
            task["name"] += f"-{index}"


def _example(place: Place, *, keep: Any) -> Any:
    """Return a value that the schema takes, with the keys of a section that all members know."""
    if place.tags:
        shared = set.intersection(*(set(Place(member).keys) for member in place.members))
        kept = keep if isinstance(keep, dict) else {}
        return {
            **{key: kept[key] for key in shared if key in kept},
            str(place.discriminator): place.tags[0],
        }
    if place.is_section:
        return {}
    name = place.expected()[0]
    if name == "a list":
        return [_example(place.child(0), keep={})]
    if name.startswith("one of "):
        return name.removeprefix("one of ").split(", ")[0]
    examples: dict[str, Any] = {"a whole number": 1, "a number": 0.5, "true or false": False}
    examples |= {"a duration": "1step", "text": "stand-in", "a path": "stand-in"}
    return examples.get(name, {})


def _put(raw: dict[str, Any], path: RawPath, value: Any) -> None:
    # Where the surroundings are no section they have their own error and their own stand-in.
    if not path:
        return
    parent, key = value_at(raw, path[:-1]), path[-1]
    if isinstance(parent, list) and isinstance(key, int):
        parent[key : key + 1] = [value]
    elif isinstance(parent, dict):
        parent[key] = value


def _delete(raw: dict[str, Any], path: RawPath) -> None:
    parent = value_at(raw, path[:-1])
    if isinstance(parent, dict):
        parent.pop(path[-1], None)


def _finding(details: ErrorDetails, location: Location, raw: dict[str, Any]) -> Finding:
    kind, value, path, place = details["type"], details["input"], location.path, location.place
    if kind.startswith("union_tag"):
        return _bad_tag(place, path, value)
    if kind == "value_error":
        return _own_message(str(details.get("ctx", {}).get("error")), location)
    if kind == "extra_forbidden":
        text = _unknown_key(str(path[-1]), value, location.parent)
    elif kind == "missing":
        text = f"required, got nothing: add {_what_to_add(path, place)}"
    elif kind in _BOUNDS:
        rule, remedy = _BOUNDS[kind]
        rule = rule.format(**details.get("ctx", {}))
        text = f"must be {rule}, got {show_value(value)}: {remedy}"
    elif kind == "literal_error":
        text = _not_one_of(place, value)
    else:
        text = _other(details, place, value_at(raw, path))
    return Finding(path, text)


def _what_to_add(path: RawPath, place: Place) -> str:
    expected = place.expected()[0]
    return f"{path[-1]} ({expected})" if isinstance(path[-1], str) else expected


def _unknown_key(key: str, value: Any, section: Place) -> str:
    known = section.keys
    homes = homes_of_key(key)
    if meant := closest(key, known):
        remedy = f"did you mean {meant}?"
    elif homes:
        remedy = f"move it to {' or '.join(homes[:3])}"
    else:
        remedy = f"remove it or use one of {', '.join(known)}"
    return f"unknown key, got {show_value(value)}: {remedy}"


def _bad_tag(place: Place, path: RawPath, value: Any) -> Finding:
    path = (*path, str(place.discriminator))
    given = value.get(place.discriminator) if isinstance(value, dict) else None
    tags = ", ".join(place.tags)
    if given is None:
        return Finding(path, f"required, got nothing: add one of {tags}")
    meant = closest(str(given), place.tags)
    remedy = f"did you mean {meant}?" if meant else "use one of them"
    return Finding(path, f"must be one of {tags}, got {show_value(given)}: {remedy}")


def _not_one_of(place: Place, value: Any) -> str:
    rule, remedy = place.expected()
    meant = closest(str(value), rule.removeprefix("one of ").split(", "))
    remedy = f"did you mean {meant}?" if meant and meant != value else remedy
    return f"must be {rule}, got {show_value(value)}: {remedy}"


def _own_message(message: str, location: Location) -> Finding:
    """Return the finding of a check in config.py, at the key that its message starts with."""
    key, _, rest = message.partition(" ")
    if key in location.place.keys:
        return Finding((*location.path, key), rest)
    return Finding(location.path, message)


def _other(details: ErrorDetails, place: Place, value: Any) -> str:
    kind = details["type"]
    if kind.endswith(("_type", "_parsing", "_from_float", "_attributes_type")):
        rule, remedy = place.expected()
        if value is None:
            remedy = "give it a value or remove the key"
        elif isinstance(value, str) and rule in ("a whole number", "a number", "true or false"):
            remedy = f"{remedy}, not as text"
        return f"must be {rule}, got {show_value(value)}: {remedy}"
    if kind == "string_pattern_mismatch":
        return (
            f"must be letters, digits, '_', '.' or '-', the first a letter or digit, "
            f"got {show_value(value)}: rename it"
        )
    if kind == "too_short":
        return f"must not be empty, got {show_value(value)}: add an item"
    return f"{details['msg'][:1].lower()}{details['msg'][1:]}, got {show_value(value)}: change it"
