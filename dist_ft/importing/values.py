"""Values of another trainer's file as the types that they must have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_NO = ("", "0", "false", "no", "none", "null", "off")
_LONGEST = 80


def as_number(value: Any, key: str) -> float:
    """Return a number; YAML reads some, like 2e-5, as text.

    Raises:
        ValueError: If it is none.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise wrong(key, "a number", value, remedy="write the one that the run had")
    return number


def as_whole(value: Any, key: str) -> int:
    """Return a whole number.

    Raises:
        ValueError: If it is none.
    """
    number = as_number(value, key)
    if number != int(number):
        raise wrong(key, "a whole number", value, remedy="write the one that the run had")
    return int(number)


def as_text(value: Any, key: str) -> str:
    """Return a text; a single number is one too.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise wrong(key, "a text", value, remedy="write a single value")
    return str(value)


def as_flag(value: Any, key: str) -> bool:
    """Return whether a key is switched on; words like ``auto`` and ``full`` switch it on.

    Raises:
        ValueError: If it is neither a truth value nor a word.
    """
    if not isinstance(value, (bool, str, int, float)):
        raise wrong(key, "true or false", value, remedy="write one of them")
    return value.strip().lower() not in _NO if isinstance(value, str) else bool(value)


def as_mapping(value: Any, key: str) -> Mapping[str, Any]:
    """Return a section.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(value, Mapping):
        raise wrong(key, "a section of `key: value` lines", value, remedy="write one, or remove it")
    return value


def as_list(value: Any, key: str) -> Sequence[Any]:
    """Return a list.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(value, list):
        raise wrong(key, "a list", value, remedy="write one, each entry behind a dash")
    return value


def as_names(value: Any, key: str) -> list[str]:
    """Return a list of texts, of which one alone may stand without a list.

    Raises:
        ValueError: If it is none.
    """
    return [as_text(v, key) for v in (value if isinstance(value, list) else [value])]


def wrong(key: str, rule: str, value: Any, *, remedy: str) -> ValueError:
    """Return the error of a value that breaks a rule."""
    shown = repr(value)
    shown = shown if len(shown) <= _LONGEST else shown[: _LONGEST - 3] + "..."
    return ValueError(f"{key}: must be {rule}, got {shown}: {remedy}")
