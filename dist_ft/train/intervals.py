"""What steps add up to between two logging intervals, over all ranks."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass

from dist_ft import dist
from dist_ft.data.augment.augmenter import AugmentStatistics
from dist_ft.data.loader import StepBatch
from dist_ft.engine.base import PrefixCounts


@dataclass
class Interval:
    """What one task did since the last step event; the loss is this rank's share."""

    steps: int = 0
    loss: float = 0.0
    tokens: int = 0
    positions: int = 0
    grad_norm: float | None = None
    wait_s: float = 0.0
    prefix_rows: int = 0
    prefix_found: int = 0
    prefix_wait_s: float = 0.0
    parked_bytes: int = 0
    changes: AugmentStatistics | None = None

    def count_prefix(self, counts: PrefixCounts) -> None:
        """Add what a step found of the frozen prefix."""
        self.prefix_rows += counts.rows
        self.prefix_found += counts.found
        self.prefix_wait_s += counts.wait_s
        self.parked_bytes = counts.parked_bytes


def prefix_figures(interval: Interval, *, rows: float, found: float) -> dict[str, float]:
    """Return what a step event says of the cached frozen prefix, if there is one.

    Args:
        interval: of this rank.
        rows: of all ranks, that start from the prefix.
        found: those of them that were kept.
    """
    if not rows:
        return {}
    about = {"prefix_hit_share": found / rows, "cache_wait_s": round(interval.prefix_wait_s, 4)}
    # Whether the weights were away in the interval's last step, on this rank.
    return {**about, "prefix_parked_bytes": interval.parked_bytes}


def over_all_ranks(
    intervals: Sequence[Interval], *, own_s: float
) -> tuple[list[tuple[float, ...]], list[float]]:
    """Return sums of each interval's numbers, and `own_s` of every rank, by one all-reduce.

    The numbers are loss, positions, rows with a cached prefix, and such as were found.
    """
    width = 4
    values = [
        value
        for i in intervals
        for value in (
            i.loss,
            float(i.positions),
            float(i.prefix_rows),
            float(i.prefix_found),
        )
    ]
    own = [own_s if rank == dist.rank() else 0.0 for rank in range(dist.world_size())]
    sums = dist.all_reduce_sum([*values, *own])
    of_tasks = sums[: len(values)]
    return (
        [tuple(of_tasks[start : start + width]) for start in range(0, len(of_tasks), width)],
        sums[len(values) :],
    )


def changes_over_ranks(
    changes: dict[str, AugmentStatistics | None],
) -> dict[str, AugmentStatistics]:
    """Return what all ranks changed together in the tasks that are augmented."""
    # Which tasks these are is the same on every rank.
    own = {task: counts for task, counts in changes.items() if counts is not None}
    if not own:
        return {}
    total = {task: AugmentStatistics() for task in own}
    for counts in dist.all_gather_object(own):
        for task, of_rank in counts.items():
            total[task].merge(of_rank)
    return total


def positions_of(batch: StepBatch) -> int:
    """Return the positions of this rank's input, padding and fillers counted."""
    return sum(
        b.inputs["input_ids"].numel() if "input_ids" in b.inputs else b.tokens
        for b in batch.micro_batches
    )


def peak_rss_bytes() -> int:
    """Return the most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
