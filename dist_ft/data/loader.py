"""The loader: step -> this rank's micro-batches, as a pure function, with one prefetch thread.

The row set of a step, and which rows share a micro-batch, don't depend on the world size: the ranks
only deal the step's micro-batches out among themselves. So the loader's state is the step, and a
run may go on with another world size.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dist_ft.data.collate import CollateSpec, collate, kept_columns
from dist_ft.data.manifest import differences
from dist_ft.data.sampling import ORDER_ALGORITHM_VERSION, Mixture, row_at, step_slots
from dist_ft.data.shards import ShardedDataset

_STATE_VERSION = 1
_PREFETCH_STEPS = 2

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BatchPlan:
    """How a step's rows are divided.

    Attributes:
        global_batch_size: rows of one step over all ranks, G.
        micro_batch_size: rows of one forward and backward; divides G.
        seed: the seed of the order.
        rank: this process, from 0.
        world_size: how many processes share the step.
    """

    global_batch_size: int
    micro_batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1 or self.global_batch_size < 1:
            raise ValueError(
                f"global_batch_size and micro_batch_size must be at least 1, got "
                f"{self.global_batch_size} and {self.micro_batch_size}"
            )
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} must be a multiple of "
                f"micro_batch_size {self.micro_batch_size}: change one of them"
            )
        _check_rank(self.rank, world_size=self.world_size)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one step over all ranks, M; fillers not counted."""
        return self.global_batch_size // self.micro_batch_size

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of one step on each rank, fillers counted."""
        return -(-self.micro_batches // self.world_size)


@dataclass
class MicroBatch:
    """What one forward needs.

    Attributes:
        inputs: keyword arguments of the model.
        targets: what the loss and the metrics need.
        kept: columns for decoding, one list entry a row.
        rows: the data set's row numbers, int64 [n].
        index: number of the micro-batch in its step (or in the evaluation), the same for any world
            size; dropout seeds come from it.
        tokens: useful tokens, padding not counted; 0 for a filler.
        loss_weight: 1.0, or 0.0 for a filler, which only keeps the ranks in step.
    """

    inputs: dict[str, torch.Tensor]
    targets: dict[str, torch.Tensor]
    kept: dict[str, list[Any]]
    rows: Int64Array
    index: int
    tokens: int
    loss_weight: float


@dataclass
class StepBatch:
    """What one rank needs for one optimizer step.

    Attributes:
        step: the optimizer step, from 0.
        task: the task's name; the same on all ranks.
        epoch: epochs of this task's data which earlier steps used.
        micro_batches: this rank's micro-batches; as many on every rank.
        global_count: loss terms of the step over all ranks.
        global_tokens: useful tokens of the step over all ranks.
        data_wait_s: how long the training thread waited for this batch, seconds.
    """

    step: int
    task: str
    epoch: float
    micro_batches: list[MicroBatch]
    global_count: int
    global_tokens: int
    data_wait_s: float = 0.0


@dataclass(frozen=True)
class StepRows:
    """Which rows a step uses: the task's name, and epochs and rows, int64 [G] each."""

    task: str
    epochs: Int64Array
    rows: Int64Array


class StepLoader:
    """Delivers the steps of a run to one rank.

    Args:
        datasets: each task's training data, in the recipe's task order.
        specs: each task's columns and padding.
        plan: sizes, seed and this rank.
        mixture: assigns steps to tasks.

    Raises:
        ValueError: tasks, specs and mixture don't agree.
    """

    def __init__(
        self,
        datasets: Mapping[str, ShardedDataset],
        *,
        specs: Mapping[str, CollateSpec],
        plan: BatchPlan,
        mixture: Mixture,
    ) -> None:
        if mixture.tasks != len(datasets):
            raise ValueError(
                f"the mixture has {mixture.tasks} tasks, but there are data for {len(datasets)} "
                f"({', '.join(datasets)})"
            )
        if missing := [task for task in datasets if task not in specs]:
            raise ValueError(f"there is no collate spec for the tasks {missing}")
        self._datasets = dict(datasets)
        self._specs = dict(specs)
        self._plan = plan
        self._mixture = mixture
        self._tasks = tuple(datasets)

    def rows_of(self, step: int) -> StepRows:
        """Returns which rows a step uses, over all ranks; a pure function of the step."""
        index, slots = step_slots(
            step, mixture=self._mixture, global_batch_size=self._plan.global_batch_size
        )
        task = self._tasks[index]
        epochs, rows = row_at(
            slots, rows=len(self._datasets[task]), seed=self._plan.seed, task=task
        )
        return StepRows(task, epochs, rows)

    def batch(self, step: int) -> StepBatch:
        """Returns this rank's part of a step; a pure function of the step.

        Raises:
            ValueError: a row can't be read, naming task, step, shard and rows.
        """
        selected = self.rows_of(step)
        dataset = self._datasets[selected.task]
        own = _deal(
            selected.rows,
            dataset=dataset,
            size=self._plan.micro_batch_size,
            rank=self._plan.rank,
            world_size=self._plan.world_size,
        )
        index = self._tasks.index(selected.task)
        used = self._mixture.steps_before(step)[index] * self._plan.global_batch_size
        spec = self._specs[selected.task]
        try:
            micro_batches = [_micro_batch(part, dataset=dataset, spec=spec) for part in own]
        except ValueError as error:
            raise ValueError(f"task {selected.task!r}, step {step}: {error}") from error
        return StepBatch(
            step=step,
            task=selected.task,
            epoch=used / len(dataset),
            micro_batches=micro_batches,
            global_count=int(dataset.loss_counts[selected.rows].sum(dtype=np.int64)),
            global_tokens=int(dataset.lengths[selected.rows].sum(dtype=np.int64)),
        )

    def iterate(self, start_step: int) -> Generator[StepBatch, None, None]:
        """Yields the steps from `start_step` on without end, reading ahead in one thread.

        Closing the generator (or dropping it) stops the thread. What was read ahead is simply
        discarded: the state of a run is the step it has consumed.

        Raises:
            ValueError: a row can't be read, naming task, step, shard and rows.
        """
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="dist_ft-prefetch") as executor:
            steps = itertools.count(start_step)
            pending: deque[Future[StepBatch]] = deque()
            try:
                while True:
                    # One more than is handed out, so that the next is read while this step runs.
                    while len(pending) <= _PREFETCH_STEPS:
                        pending.append(executor.submit(self.batch, next(steps)))
                    started = time.perf_counter()
                    batch = pending.popleft().result()
                    batch.data_wait_s = time.perf_counter() - started
                    yield batch
            finally:
                for future in pending:
                    future.cancel()

    def state_dict(self, step: int) -> dict[str, Any]:
        """Returns, as JSON, what the order of the data depends on and the next step to consume."""
        return {
            "version": _STATE_VERSION,
            "order_algorithm_version": ORDER_ALGORITHM_VERSION,
            "step": step,
            "seed": self._plan.seed,
            "global_batch_size": self._plan.global_batch_size,
            "mixture": dict(self._mixture.state()),
            "tasks": list(self._tasks),
            "datasets": {
                task: {"dataset_id": data.manifest.dataset_id, "rows": len(data)}
                for task, data in self._datasets.items()
            },
        }

    def check_state(self, state: Mapping[str, Any], *, allow_data_change: bool = False) -> int:
        """Returns the next step of a saved state after comparing it with this loader.

        World size, rank and micro-batch size may differ; they are no part of the state.

        Args:
            state: what `state_dict` returned when the checkpoint was written.
            allow_data_change: accept other data, seed, batch size or mixture; the rows that were
                already used are then not those that this loader would have used.

        Raises:
            ValueError: the state has another version, or something differs, naming each difference.
        """
        for key in ("version", "order_algorithm_version", "step"):
            if not isinstance(state.get(key), int):
                raise ValueError(f"the data state has no {key}: the checkpoint is damaged")
        own = self.state_dict(int(state["step"]))
        changed = differences(dict(state), own)
        versions = ("version", "order_algorithm_version")
        fatal = [line for line in changed if line.split(":")[0] in versions]
        if fatal or (changed and not allow_data_change):
            raise ValueError(
                "the data order of the checkpoint differs from this run's "
                f"(checkpoint -> run): {'; '.join(fatal or changed)}: resume with the same data, "
                "seed and global batch size, or start a new run"
            )
        return int(state["step"])


def eval_batches(
    dataset: ShardedDataset,
    *,
    spec: CollateSpec,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[MicroBatch]:
    """Yields this rank's micro-batches of an evaluation, longest rows first.

    Every row comes exactly once over the ranks and every rank gets as many micro-batches; where
    they don't divide, the rest are fillers with loss_weight 0. The content of micro-batch `index`
    doesn't depend on the world size.

    Args:
        dataset: the evaluation data.
        spec: columns and padding.
        micro_batch_size: rows of one forward.
        rank: this process, from 0.
        world_size: how many processes share the evaluation.

    Raises:
        ValueError: a size or the rank is out of range, or a row can't be read.
    """
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size must be at least 1, got {micro_batch_size}")
    _check_rank(rank, world_size=world_size)
    # Longest first: a micro-batch that doesn't fit into memory fails at once. Stable, so that every
    # rank finds the same order.
    order = np.argsort(-dataset.lengths.astype(np.int64), kind="stable").astype(np.int64)
    own = _deal(order, dataset=dataset, size=micro_batch_size, rank=rank, world_size=world_size)
    return (_micro_batch(part, dataset=dataset, spec=spec) for part in own)


@dataclass(frozen=True)
class _Part:
    """The rows of one micro-batch; a filler repeats a row of another one."""

    index: int
    rows: Int64Array
    filler: bool


def _deal(
    rows: Int64Array, *, dataset: ShardedDataset, size: int, rank: int, world_size: int
) -> list[_Part]:
    """Returns a rank's micro-batches: number j goes to rank j % W, fillers make the ranks even."""
    count = -(-len(rows) // size)
    parts = []
    for index in range(rank, -(-count // world_size) * world_size, world_size):
        filler = index >= count
        own = rows[index * size : (index + 1) * size]
        # A filler needs some valid rows of the same task, so that the rank runs the same modules;
        # the shortest one costs least.
        parts.append(_Part(index, _shortest(rows, dataset=dataset) if filler else own, filler))
    return parts


def _shortest(rows: Int64Array, *, dataset: ShardedDataset) -> Int64Array:
    return rows[[int(np.argmin(dataset.lengths[rows]))]]


def _micro_batch(part: _Part, *, dataset: ShardedDataset, spec: CollateSpec) -> MicroBatch:
    try:
        columns = dataset.take(part.rows, columns=spec.columns)
        inputs, targets = collate(columns, spec)
        kept = kept_columns(columns, spec)
    except ValueError as error:
        raise ValueError(f"{_place(part.rows, dataset=dataset)}: {error}") from error
    return MicroBatch(
        inputs=inputs,
        targets=targets,
        kept=kept,
        rows=part.rows,
        index=part.index,
        tokens=0 if part.filler else int(dataset.lengths[part.rows].sum(dtype=np.int64)),
        loss_weight=0.0 if part.filler else 1.0,
    )


def _place(rows: Sequence[int] | Int64Array, *, dataset: ShardedDataset) -> str:
    shards = sorted({dataset.shard_of(int(row)) for row in rows})
    numbers = ", ".join(str(int(row)) for row in rows[:8]) + (", ..." if len(rows) > 8 else "")
    return f"rows {numbers} of {dataset.folder} ({', '.join(shards[:4])})"


def _check_rank(rank: int, *, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank must lie in [0, world_size), got rank {rank} and world_size {world_size}"
        )
