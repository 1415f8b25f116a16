"""Rows that can't be used: where they are, as an editor shows it, and what becomes of them."""

from __future__ import annotations

from typing import NoReturn

from dist_ft.data.files import BadRow, refusal
from dist_ft.data.sources import RawSource
from dist_ft.wording import counted

# Told of rows that are left out; the others are counted.
_MOST_REASONS = 5
_MOST_PLACES = 3


class BadRows:
    """What happens to the rows of a source that can't be used: an error, or a counted skip.

    Args:
        source: the rows' source.
        skip: leave bad rows out instead of raising.
        key: the recipe's key that decides it, for the error.
    """

    def __init__(self, source: RawSource, *, skip: bool, key: str = "on_error") -> None:
        self._source = source
        self._skip = skip
        self._key = key
        self._others = 0
        # By reason: how many, and the first ones, as places or as numbers in the source.
        self._counts: dict[str, int] = {}
        self._first: dict[str, list[str | int]] = {}
        self.count = 0

    def of_another_split(self) -> BadRows:
        """Returns what does the same to rows that another split of the source counts and tells."""
        return BadRows(self._source, skip=self._skip, key=self._key)

    def unreadable(self, row: BadRow) -> None:
        """Leaves out a row that its reader could not read, or raises ValueError."""
        if not self._skip:
            self._refuse(str(row), cause=None)
        self._add(row.place, reason=row.reason)

    def refused(self, number: int, reason: str, *, cause: Exception | None = None) -> None:
        """Leaves out the source's row `number`, from 0, or raises ValueError."""
        if not self._skip:
            self._refuse(f"{self._source.places([number])[number]}: {reason}", cause=cause)
        self._add(number, reason=reason)

    def _refuse(self, text: str, *, cause: Exception | None) -> NoReturn:
        raise ValueError(refusal(text, key=self._key)) from cause

    def _add(self, row: str | int, *, reason: str) -> None:
        self.count += 1
        if reason not in self._counts and len(self._counts) == _MOST_REASONS:
            self._others += 1
            return
        self._counts[reason] = self._counts.get(reason, 0) + 1
        first = self._first.setdefault(reason, [])
        if len(first) < _MOST_PLACES:
            first.append(row)

    def summary(self) -> list[str]:
        """Returns a line for each reason: how many rows were left out, and where the first are."""
        numbers = {row for rows in self._first.values() for row in rows if isinstance(row, int)}
        found = self._source.places(numbers) if numbers else {}
        lines = []
        for reason, count in self._counts.items():
            places = [row if isinstance(row, str) else found[row] for row in self._first[reason]]
            more = "; ..." if count > len(places) else ""
            lines.append(f"left out {counted(count, 'row')}: {reason} ({'; '.join(places)}{more})")
        if self._others:
            lines.append(f"left out for other reasons: {self._others:,}")
        return lines
