"""Words that several parts of the program say alike."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return a number and what it counts, such as "1 step" or "1,200 steps"."""
    return f"{number:,} {noun if number == 1 else f'{noun}s'}"
