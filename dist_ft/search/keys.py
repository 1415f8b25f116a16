"""The candidates of a search over recipe keys: values drawn from ranges.

Nothing here trains anything; the candidates are a function of ranges, number and seed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_ft.recipe.reading import parse_yaml

# What may differ between runs that are compared after the same steps on the same data.
SECTIONS = ("optim", "regularization", "freezing", "balancing")


@dataclass(frozen=True, order=True)
class Candidate:
    """One set of values.

    Attributes:
        number: Place among the candidates; 0 is the recipe as it stands.
        overrides: ``key=value`` each, as on the command line.
    """

    number: int
    overrides: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return the values in words."""
        return " ".join(self.overrides) or "the recipe itself"


@dataclass(frozen=True)
class Range:
    """The values that a key may have.

    Attributes:
        key: Dotted path in the recipe.
        value: Returns the value at a place in [0, 1).
        bounds: Least and largest value of ``log`` and ``uniform``; None for the others.
    """

    key: str
    value: Callable[[float], Any]
    bounds: tuple[float, float] | None = None

    @classmethod
    def parse(cls, text: str) -> Range:
        """Return the range written as ``key=log:1e-5:1e-3``, ``uniform:``, ``int:`` or ``choice:``.

        Raises:
            ValueError: If it is written otherwise, or is of a section that can't be compared.
        """
        key, equals, rest = text.partition("=")
        kind, colon, values = rest.partition(":")
        problem = f"--over: {text!r} must be KEY=KIND:VALUES: write it like optim.lr=log:1e-5:1e-3"
        if not equals or not colon or kind not in _KINDS:
            raise ValueError(f"{problem}; kinds are {', '.join(_KINDS)}")
        if key.split(".")[0] not in SECTIONS:
            raise ValueError(
                f"--over: {key} can't be searched, as only runs of the same length on the same "
                f"data can be compared: use keys of {', '.join(SECTIONS)}"
            )
        try:
            bounds = _bounds(values) if kind in ("log", "uniform") else None
            return cls(key, _KINDS[kind](values), bounds)
        except ValueError as error:
            raise ValueError(f"{problem} ({error})") from None


def _bounds(text: str) -> tuple[float, float]:
    low, _, high = text.partition(":")
    bounds = float(low), float(high)
    if not bounds[0] < bounds[1]:
        raise ValueError("the first bound must be below the second")
    return bounds


def _log(text: str) -> Callable[[float], float]:
    low, high = _bounds(text)
    if low <= 0:
        raise ValueError("a logarithmic range must be above 0")
    return lambda place: float(f"{low * (high / low) ** place:.4g}")


def _uniform(text: str) -> Callable[[float], float]:
    low, high = _bounds(text)
    return lambda place: float(f"{low + (high - low) * place:.4g}")


def _int(text: str) -> Callable[[float], int]:
    low, high = _bounds(text)
    return lambda place: math.floor(low + (high - low + 1) * place)


def _choice(text: str) -> Callable[[float], Any]:
    values = [part.strip() for part in text.split("|")]
    for value in values:
        if parse_yaml(value, name="value").problems:
            raise ValueError(f"{value!r} is no YAML")
    return lambda place: values[math.floor(place * len(values))]


_KINDS: Mapping[str, Callable[[str], Callable[[float], Any]]] = {
    "log": _log, "uniform": _uniform, "int": _int, "choice": _choice,
}  # fmt: skip


def draw(ranges: Sequence[Range], *, count: int, seed: int) -> list[Candidate]:
    """Return the recipe itself and `count - 1` other candidates, spread over the ranges.

    A Latin hypercube (McKay, Beckman and Conover 1979): each key's range is cut into as many parts
    as there are candidates, and each candidate has another part. Candidates that turn out alike,
    as those of a few choices may, are there once.

    Raises:
        ValueError: If there are fewer than two.
    """
    if count < 2 or not ranges:
        raise ValueError(f"--trials must be at least 2, got {count}: the recipe itself is one")
    dice = random.Random(f"search {seed}")
    columns: list[list[Any]] = []
    for of_key in ranges:
        places = [(part + dice.random()) / (count - 1) for part in range(count - 1)]
        dice.shuffle(places)
        columns.append([f"{of_key.key}={of_key.value(place)}" for place in places])
    distinct = dict.fromkeys(zip(*columns, strict=True))
    return [Candidate(0), *(Candidate(i, values) for i, values in enumerate(distinct, start=1))]


@dataclass(frozen=True)
class KeySpace:
    """Says how dear candidates are: as none is known to be dearer, all cost the same."""

    def cost(self, candidate: Candidate, /) -> float:
        """Return the cost of a step."""
        del candidate
        return 1.0
