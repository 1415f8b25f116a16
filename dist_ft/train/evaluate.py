"""Scores a task on a prepared split over all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dist_ft import dist
from dist_ft.data.collate import CollateSpec
from dist_ft.data.loader import MicroBatch, eval_batches
from dist_ft.data.shards import ShardedDataset
from dist_ft.tasks.base import Task

Forward = Callable[[str, MicroBatch], tuple[Tensor, Any]]


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
    """Metrics of a task on a split, with the wall time that they took in seconds."""

    task: str
    split: str
    metrics: dict[str, float]
    seconds: float


def evaluate_task(data: EvalData, *, forward: Forward, world: dist.World) -> Scores:
    """Return the metrics of `data`; every rank gets the same.

    The ranks share the rows out, the records of all ranks come together, each row once and in
    row order, and are scored in one place: the metrics are those of a single rank by
    construction.

    Args:
        data: What to score.
        forward: Runs a micro-batch without gradients and returns summed loss and outputs.
        world: This rank's place.
    """
    began = time.monotonic()
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
    values = metrics.compute([unique[row] for row in sorted(unique)])
    count = int(data.dataset.loss_counts.sum(dtype="int64"))
    scores = {"loss": total / max(1, count), **values}
    return Scores(data.task.name, data.split, scores, time.monotonic() - began)
