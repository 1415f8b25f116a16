"""How far reading a source has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console as RichConsole
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

from dist_ft.tables import ProgressAbove

Row = TypeVar("Row")

_EVERY_S = 10.0
_EVERY_ROWS = 1000


class ReadingProgress:
    """Shows rows read, rows a second and the time that is left, from the first call on.

    Args:
        name: What is read.
        expected: Returns about how many rows there are, None if nobody knows.
        say: Prints a line, where there is no terminal.
        terminal: Where the bar goes; None prints lines instead.
    """

    def __init__(
        self,
        name: str,
        *,
        expected: Callable[[], int | None],
        say: Callable[[str], None],
        terminal: RichConsole | None = None,
    ) -> None:
        self._name = name
        self._expected = expected
        self._say = say
        self._terminal = terminal
        self._bar: ProgressAbove | None = None
        self._total: int | None = None
        self._began: float | None = None
        self._told = 0.0

    def __enter__(self) -> Self:
        """Wait for the first call."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, read: int) -> None:
        """Show that so many rows are read."""
        now = time.monotonic()
        if self._began is None:
            self._begin(now)
        assert self._began is not None
        rate = read / max(1e-9, now - self._began)
        if self._bar is not None:
            # An estimate may be too low.
            total = None if self._total is None else max(self._total, read)
            text = f"{read:,} rows | {rate:,.0f} rows/s"
            self._bar.update(self._bar.task_ids[0], completed=read, total=total, text=text)
        elif now - self._told >= _EVERY_S:
            self._told = now
            self._say(
                f"{self._name}: {read:,} rows read, {rate:,.0f} rows/s{self._left(read, rate)}"
            )

    def each(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows and count them."""
        for number, row in enumerate(rows):
            if number % _EVERY_ROWS == 0:
                self(number)
            yield row

    def _begin(self, now: float) -> None:
        self._began = self._told = now
        self._total = self._expected()
        if self._terminal is None:
            return
        columns = (TextColumn("{task.description}"), BarColumn(28), TimeRemainingColumn())
        self._bar = ProgressAbove(*columns, console=self._terminal)
        self._bar.start()
        self._bar.add_task(self._name, total=self._total, text="")

    def _left(self, read: int, rate: float) -> str:
        if self._total is None or read > self._total:
            return ""
        return f", about {(self._total - read) / max(rate, 1e-9):,.0f} s left"
