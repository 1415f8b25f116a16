"""Lengths of training with a unit: steps, epochs or tokens."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

Unit = Literal["ep", "step", "tok"]

_PATTERN = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*(ep|step|tok)\s*")


@dataclass(frozen=True)
class Duration:
    """A length of training: ``3ep``, ``500step`` or ``2e6tok``.

    Attributes:
        value: How many of the unit; steps and tokens are whole numbers.
        unit: ``ep`` (epochs over all tasks' rows), ``step`` (optimizer steps) or ``tok``
            (useful input tokens, padding not counted).
    """

    value: float
    unit: Unit

    @classmethod
    def parse(cls, text: str) -> Duration:
        """Return the duration written as a number and a unit.

        Raises:
            ValueError: If the text is not a number followed by ``ep``, ``step`` or ``tok``.
        """
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(
                f"a duration is a number with a unit, got {text!r}: "
                "write it like 3ep, 500step or 2e6tok"
            )
        value, unit = float(match.group(1)), match.group(2)
        if not math.isfinite(value):
            raise ValueError(f"a duration must be finite, got {text!r}: lower it")
        if unit == "step":
            return cls(_whole(value, text), "step")
        if unit == "tok":
            return cls(_whole(value, text), "tok")
        return cls(value, "ep")

    def steps(self, *, steps_per_epoch: float, tokens_per_step: float) -> int:
        """Return the duration in optimizer steps, rounded up.

        Args:
            steps_per_epoch: Optimizer steps in one epoch.
            tokens_per_step: Mean number of useful tokens in one optimizer step.
        """
        if self.unit == "step":
            return int(self.value)
        exact = self.value * steps_per_epoch if self.unit == "ep" else self.value / tokens_per_step
        # Rounding first keeps 3ep of 10 steps at 30 whatever the last bit of the product is.
        return -int(-round(exact, 6) // 1)

    def __str__(self) -> str:
        number = int(self.value) if self.value == int(self.value) else self.value
        return f"{number}{self.unit}"


def _whole(value: float, text: str) -> int:
    if value != int(value):
        raise ValueError(f"steps and tokens are whole numbers, got {text!r}: write a whole number")
    return int(value)
