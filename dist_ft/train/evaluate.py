"""Scores a task on a prepared split over all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from dist_ft import dist
from dist_ft.data.collate import CollateSpec
from dist_ft.data.loader import MicroBatch, eval_batches
from dist_ft.data.shards import ShardedDataset
from dist_ft.tasks.base import Metrics, Record, Task
from dist_ft.train.forgetting import correct_rows

Forward = Callable[[str, MicroBatch], tuple[Tensor, Any]]


class ScoringMemoryError(RuntimeError):
    """A device that has no room for a micro-batch of an evaluation.

    Attributes:
        smaller: Rows of a micro-batch that may fit instead; 0 if it was a single one.
    """

    def __init__(self, task: str, why: str, *, smaller: int) -> None:
        """Take the task that was scored, what the device said, and how many rows may fit."""
        super().__init__(f"evaluation of task {task}, {why}")
        self.smaller = smaller


@dataclass(frozen=True)
class EvalData:
    """A task's split and how its rows become micro-batches."""

    task: Task
    split: str
    dataset: ShardedDataset
    spec: CollateSpec
    micro_batch_size: int
    generate: Callable[[MicroBatch], list[str]] | None = None


@dataclass(frozen=True)
class Scores:
    """Metrics of a task on a split.

    Attributes:
        task: Name of the task.
        split: Name of the split.
        metrics: By name.
        seconds: Wall time that they took.
        rows: How many were scored.
        intervals: 95 % confidence interval of each metric that was resampled.
        correct: Which rows were right, see `forgetting.correct_rows`.
    """

    task: str
    split: str
    metrics: dict[str, float]
    seconds: float
    rows: int = 0
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    correct: str | None = None


def evaluate_task(
    data: EvalData, *, forward: Forward, world: dist.World, resamples: int = 0
) -> Scores:
    """Return the metrics of `data`; every rank gets the same.

    The ranks share the rows out, the records of all ranks come together, each row once and in
    row order, and are scored in one place: the metrics are those of a single rank by
    construction.

    Args:
        data: What to score.
        forward: Runs a micro-batch without gradients and returns summed loss and outputs.
        world: This rank's place.
        resamples: Draws for the confidence intervals; 0 leaves them out.
    """
    began = time.monotonic()
    metrics, records, total = collect(data, forward=forward, world=world)
    values = metrics.compute(records)
    count = int(data.dataset.loss_counts.sum(dtype="int64"))
    scores = {"loss": total / max(1, count), **values}
    intervals = bootstrap(metrics, records, resamples=resamples) if resamples else {}
    return Scores(
        task=data.task.name,
        split=data.split,
        metrics=scores,
        seconds=time.monotonic() - began,
        rows=len(records),
        intervals=intervals,
        correct=correct_rows(records),
    )


def collect(
    data: EvalData, *, forward: Forward, world: dist.World
) -> tuple[Metrics, list[Record], float]:
    """Return metrics to compute, the records of all rows in row order, and the summed loss."""
    metrics = data.task.new_metrics()
    loss_sum = 0.0
    for batch in eval_batches(
        data.dataset,
        spec=data.spec,
        micro_batch_size=data.micro_batch_size,
        rank=world.rank,
        world_size=world.world_size,
    ):
        loss, outputs = forward(data.task.name, batch)
        # Fillers generate too: under ZeRO-3 every rank must run the same modules.
        texts = None if data.generate is None else data.generate(batch)
        if batch.loss_weight > 0:
            loss_sum += float(loss)
            metrics.update(outputs, batch, texts=texts)
    (total,) = dist.all_reduce_sum([loss_sum])
    gathered = [
        record for records in dist.all_gather_object(metrics.records()) for record in records
    ]
    unique = {record["row"]: record for record in gathered}
    return metrics, [unique[row] for row in sorted(unique)], total


def bootstrap(
    metrics: Metrics, records: Sequence[Record], *, resamples: int
) -> dict[str, tuple[float, float]]:
    """Return the 95 % percentile bootstrap interval of each metric (Efron 1979).

    Examples are drawn with replacement, all windows of one together, the same for every run of the
    same split, so that the intervals of two runs can be compared.
    """
    draw = np.random.default_rng(0)
    examples = list(_examples(records).values())
    found: dict[str, list[float]] = {}
    for _ in range(resamples):
        for name, value in metrics.compute(_drawn(examples, draw)).items():
            found.setdefault(name, []).append(value)
    return {name: _interval(values) for name, values in found.items()}


def paired_bootstrap(
    metrics: Metrics, one: Sequence[Record], other: Sequence[Record], *, resamples: int
) -> dict[str, tuple[float, float, float]]:
    """Return how much larger each metric of `one` is than that of `other`, with its 95 % interval.

    Each resample draws the same examples for both (Koehn 2004), so that what makes an example
    hard for both cancels out.

    Args:
        metrics: Of the task.
        one: Records of a model.
        other: Records of another on the same rows.
        resamples: Draws.

    Raises:
        ValueError: If the rows differ.
    """
    left, right = _examples(one), _examples(other)
    if left.keys() != right.keys():
        raise ValueError(
            f"the runs are compared on the same rows, got {len(left)} and {len(right)} that are "
            "not the same: prepare both from one source and split"
        )
    keys = list(left)
    points, others = metrics.compute(one), metrics.compute(other)
    found: dict[str, list[float]] = {}
    for seed in range(resamples):
        ours = metrics.compute(_drawn([left[k] for k in keys], np.random.default_rng(seed)))
        theirs = metrics.compute(_drawn([right[k] for k in keys], np.random.default_rng(seed)))
        for name, value in ours.items():
            found.setdefault(name, []).append(value - theirs[name])
    return {
        name: (points[name] - others[name], *_interval(values)) for name, values in found.items()
    }


def _examples(records: Sequence[Record]) -> dict[Any, list[Record]]:
    clusters: dict[Any, list[Record]] = {}
    for record in records:
        clusters.setdefault(record.get("example", record["row"]), []).append(record)
    return clusters


def _drawn(examples: Sequence[list[Record]], draw: np.random.Generator) -> list[Record]:
    # An example that is drawn twice counts twice: its copies are examples of their own.
    return [
        {**record, "example": place}
        for place, index in enumerate(draw.integers(0, len(examples), len(examples)))
        for record in examples[index]
    ]


def _interval(values: Sequence[float]) -> tuple[float, float]:
    return float(np.percentile(values, 2.5)), float(np.percentile(values, 97.5))
