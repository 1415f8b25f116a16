"""Rows that a run had learnt and lost again, counted over its evaluations."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_ft.tasks.base import Record

# One bit for each row and evaluation goes into the run's log: at most 11 kB of text a time.
MOST_ROWS = 65_536

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


def correct_rows(records: Sequence[Record]) -> str | None:
    """Return which rows were right, as text for the log; None where right has no meaning.

    Args:
        records: Of all rows, in row order. A row is right where its prediction is its label: one
            class, the set of them, or every tag.
    """
    if not 0 < len(records) <= MOST_ROWS or not all(map(_has_answer, records)):
        return None
    right = np.array([r["prediction"] == r["label"] for r in records])
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def _has_answer(record: Record) -> bool:
    # A number's distance from another one is never exactly none.
    values = (record.get("prediction"), record.get("label"))
    return all(isinstance(value, int | list) for value in values)


@dataclass(frozen=True)
class Forgetting:
    """What became of each row over a run's evaluations (Toneva et al. 2019, section 2).

    The paper looks at training rows as they come; here every row of a split is looked at in every
    evaluation, which costs nothing more.

    Attributes:
        evaluations: How many there were.
        events: How often each row was right and then, at the next evaluation, wrong; int64 [rows].
        ever_right: Whether a row was right at any evaluation, bool [rows].
    """

    evaluations: int
    events: Ints
    ever_right: Bools

    def summary(self) -> dict[str, int]:
        """Return counts of rows: never learnt, learnt and never forgotten, and all events."""
        return {
            "evaluations": self.evaluations,
            "never_learnt": int((~self.ever_right).sum()),
            "never_forgotten": int((self.ever_right & (self.events == 0)).sum()),
            "events": int(self.events.sum()),
        }

    def most(self, count: int) -> list[tuple[int, int]]:
        """Return (row, events) of the rows forgotten most often, at most `count`; ties by row."""
        order = np.argsort(-self.events, kind="stable")[:count]
        return [(int(row), int(self.events[row])) for row in order if self.events[row] > 0]


def count_forgetting(
    events: Iterable[Mapping[str, Any]], *, task: str, rows: int
) -> Forgetting | None:
    """Return what the log's evaluations of a task say; None with fewer than two of them.

    Args:
        events: Of the run, in order.
        task: The task.
        rows: Rows of its validation split; evaluations of another number are left out.
    """
    seen = {
        event["step"]: _bits(event["correct"], rows)
        for event in events
        if event["event"] == "eval" and event["task"] == task and event["split"] == "validation"
        if event.get("correct") is not None and event["rows"] == rows
    }
    if len(seen) < 2:
        return None
    right = np.stack([seen[step] for step in sorted(seen)])
    lost = right[:-1] & ~right[1:]
    return Forgetting(len(right), lost.sum(axis=0, dtype=np.int64), right.max(axis=0))


def _bits(text: str, rows: int) -> Bools:
    packed = np.frombuffer(base64.b64decode(text), np.uint8)
    return np.unpackbits(packed, count=rows).astype(bool)
