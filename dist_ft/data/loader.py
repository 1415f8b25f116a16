"""The loader: step -> this rank's micro-batches, as a pure function, with one prefetch thread.

The row set of a step, and which rows share a micro-batch, don't depend on the world size: the ranks
only deal the step's micro-batches out among themselves. So the loader's state is the step, and a
run may go on with another world size.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_ft.data.augment.augmenter import AugmentStatistics
from dist_ft.data.augmented import Augmentation, AugmentedReader, AugmentedRows
from dist_ft.data.collate import CollateSpec
from dist_ft.data.manifest import differences
from dist_ft.data.micro_batches import (
    BatchPlan,
    MicroBatch,
    Part,
    check_rank,
    make_micro_batch,
    parts_by_length,
    parts_in_turn,
    read_parts,
)
from dist_ft.data.planning import LengthPlan
from dist_ft.data.sampling import ORDER_ALGORITHM_VERSION, Mixture, rows_between, step_slots
from dist_ft.data.shards import Columns, ShardedDataset

__all__ = [
    "Augmentation",
    "BatchPlan",
    "LengthPlan",
    "MicroBatch",
    "StepBatch",
    "StepLoader",
    "StepRows",
    "eval_batches",
]

_STATE_VERSION = 1
_PREFETCH_STEPS = 2

Int64Array = npt.NDArray[np.int64]


@dataclass
class StepBatch:
    """What one rank needs for one optimizer step.

    Attributes:
        step: the optimizer step, from 0.
        task: the task's name; the same on all ranks.
        epoch: epochs of this task's data which earlier steps used.
        micro_batches: this rank's micro-batches; as many on every rank.
        global_count: loss terms of the step over all ranks.
        global_tokens: useful tokens of the step over all ranks; of augmented rows, as prepared.
        data_wait_s: how long the training thread waited for this batch, seconds.
        augmentation: what was changed; over the ranks, each raw row of the step is counted once
            (one with windows on several ranks once on each). None without augmentation.
        joined: further turns of the step, if it accumulates several; their `step` is the turn's.
    """

    step: int
    task: str
    epoch: float
    micro_batches: list[MicroBatch]
    global_count: int
    global_tokens: int
    data_wait_s: float = 0.0
    augmentation: AugmentStatistics | None = None
    joined: list[StepBatch] = field(default_factory=list)

    @property
    def turns(self) -> list[StepBatch]:
        """The parts of the step, each with rows of one task: this one, and those joined to it."""
        return [self, *self.joined]


@dataclass(frozen=True)
class StepRows:
    """Which rows a step uses: the task's name, and epochs and rows, int64 [G] each."""

    task: str
    epochs: Int64Array
    rows: Int64Array


@dataclass(frozen=True)
class _Augmented:
    """Augmented rows of a step: where each of the step's rows is among them, and its loss terms."""

    rows: AugmentedRows
    position: Int64Array
    added_loss_terms: int

    def columns_of(self, part: Part) -> Columns:
        return self.rows.select(self.position[part.places])


class StepLoader:
    """Delivers the steps of a run to one rank.

    Args:
        datasets: each task's training data, in the recipe's task order.
        specs: each task's columns and padding.
        plan: sizes, seed and this rank.
        mixture: assigns steps to tasks.
        augmentation: how the tasks named are augmented; the others are read as prepared.
        pin_memory: `iterate` delivers tensors in page-locked memory; needs a GPU.
        on_read: called by `iterate`, in the thread that reads ahead, with each step's batch.

    Raises:
        ValueError: tasks, specs, mixture and augmentation don't agree.
    """

    def __init__(
        self,
        datasets: Mapping[str, ShardedDataset],
        *,
        specs: Mapping[str, CollateSpec],
        plan: BatchPlan,
        mixture: Mixture,
        augmentation: Mapping[str, Augmentation] | None = None,
        pin_memory: bool = False,
        on_read: Callable[[StepBatch], None] | None = None,
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
        self._pin_memory = pin_memory
        self._on_read = on_read
        self._tasks = tuple(datasets)
        self._readers = {
            task: AugmentedReader(datasets[task], augmentation=how, seed=plan.seed, task=task)
            for task, how in (augmentation or {}).items()
            if task in datasets
        }
        if unknown := [task for task in augmentation or {} if task not in datasets]:
            raise ValueError(f"augmentation names the tasks {unknown}, which there are no data for")

    def replan(self, micro_batch_size: int, *, max_tokens: int | None) -> None:
        """Divides later steps into other micro-batches; which rows they use stays.

        An iteration that runs has read ahead in the old ones: begin another.

        Args:
            micro_batch_size: rows of one micro-batch; divides the global batch size.
            max_tokens: budget of one micro-batch, where the layout has one.
        """
        layout = self._plan.layout
        if layout is not None and max_tokens is not None:
            layout = replace(layout, max_tokens=max_tokens)
        self._plan = replace(self._plan, micro_batch_size=micro_batch_size, layout=layout)

    def rows_of(self, step: int) -> StepRows:
        """Returns which rows a step uses, over all ranks; a pure function of the step."""
        index, slots = step_slots(
            step, mixture=self._mixture, global_batch_size=self._plan.global_batch_size
        )
        task = self._tasks[index]
        epochs, rows = rows_between(
            int(slots[0]),
            int(slots[-1]) + 1,
            rows=len(self._datasets[task]),
            seed=self._plan.seed,
            task=task,
        )
        return StepRows(task, epochs, rows)

    def turns_of(self, step: int) -> list[StepRows]:
        """Returns which rows a step uses, as the one turn that it has."""
        return [self.rows_of(step)]

    def batch(self, step: int) -> StepBatch:
        """Returns this rank's part of a step; a pure function of the step.

        Raises:
            ValueError: a row can't be read, naming task, step, shard and rows.
        """
        selected = self.rows_of(step)
        dataset = self._datasets[selected.task]
        index = self._tasks.index(selected.task)
        used = self._mixture.steps_before(step)[index] * self._plan.global_batch_size
        global_count = int(dataset.loss_counts[selected.rows].sum(dtype=np.int64))
        try:
            parts = self._parts(dataset.lengths[selected.rows].astype(np.int64))
            augmented = self._augmented(selected, parts=parts)
            micro_batches = self._micro_batches(selected, parts=parts, augmented=augmented)
        except ValueError as error:
            raise ValueError(f"task {selected.task!r}, step {step}: {error}") from error
        if len(np.unique(selected.rows)) < len(selected.rows):
            for micro_batch in micro_batches:
                micro_batch.distinct = False
        if (reader := self._readers.get(selected.task)) is not None:
            reader.number_versions(micro_batches, parts=parts, epochs=selected.epochs)
        return StepBatch(
            step=step,
            task=selected.task,
            epoch=used / len(dataset),
            micro_batches=micro_batches,
            global_count=global_count + (augmented.added_loss_terms if augmented else 0),
            global_tokens=int(dataset.lengths[selected.rows].sum(dtype=np.int64)),
            augmentation=self._changes(augmented, task=selected.task),
        )

    def _changes(self, augmented: _Augmented | None, *, task: str) -> AugmentStatistics | None:
        """Returns what this rank tells of the changes: where each makes all of them, the first."""
        if augmented is None:
            return None
        repeated = self._readers[task].varying_loss_counts and self._plan.rank > 0
        return AugmentStatistics() if repeated else augmented.rows.statistics

    def _augmented(self, selected: StepRows, *, parts: Sequence[Part]) -> _Augmented | None:
        """Returns the augmented rows of a step that this rank needs, None without augmentation."""
        reader = self._readers.get(selected.task)
        if reader is None:
            return None
        places = np.arange(len(selected.rows))
        if not reader.varying_loss_counts:
            # The others' rows change nothing that this rank needs to know. Fillers stay as they
            # are.
            own = [part.places for part in parts if not part.filler]
            places = np.concatenate(own) if own else places[:0]
        rows = reader.read(
            selected.rows[places],
            selected.epochs[places],
            columns=self._specs[selected.task].columns,
        )
        position = np.full(len(selected.rows), -1)
        position[places] = np.arange(len(places))
        stored = self._datasets[selected.task].loss_counts[selected.rows[places]]
        added = int(rows.loss_counts.sum()) - int(stored.sum(dtype=np.int64))
        return _Augmented(rows, position, added)

    def _micro_batches(
        self, selected: StepRows, *, parts: Sequence[Part], augmented: _Augmented | None
    ) -> list[MicroBatch]:
        dataset, spec = self._datasets[selected.task], self._specs[selected.task]
        if augmented is None:
            read = read_parts(parts, rows=selected.rows, dataset=dataset, spec=spec)
        else:
            read = [None if part.filler else augmented.columns_of(part) for part in parts]
        return [
            make_micro_batch(part, rows=selected.rows, dataset=dataset, spec=spec, columns=columns)
            for part, columns in zip(parts, read, strict=True)
        ]

    def _parts(self, lengths: Int64Array) -> list[Part]:
        """Returns this rank's micro-batches of a step."""
        plan = self._plan
        if plan.layout is None:
            return parts_in_turn(
                lengths, size=plan.micro_batch_size, rank=plan.rank, world_size=plan.world_size
            )
        return parts_by_length(
            lengths,
            count=plan.micro_batches,
            plan=plan.layout,
            rank=plan.rank,
            world_size=plan.world_size,
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
                        pending.append(executor.submit(self._delivered, next(steps)))
                    started = time.perf_counter()
                    batch = pending.popleft().result()
                    batch.data_wait_s = time.perf_counter() - started
                    yield batch
            finally:
                for future in pending:
                    future.cancel()

    def _delivered(self, step: int) -> StepBatch:
        batch = self.batch(step)
        if self._pin_memory:
            # Here, in the thread: it is a copy, into memory that torch keeps for the next ones.
            for micro_batch in batch.micro_batches:
                micro_batch.pin()
        if self._on_read is not None:
            self._on_read(batch)
        return batch

    def state_dict(self, step: int) -> dict[str, Any]:
        """Returns, as JSON, what the order of the data depends on and the next step to consume."""
        state = {
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
        if self._readers:
            state["augmentation"] = {task: r.describe() for task, r in self._readers.items()}
        return state

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
    check_rank(rank, world_size=world_size)
    # Longest first: a micro-batch that doesn't fit into memory fails at once. Stable, so that every
    # rank finds the same order.
    order = np.argsort(-dataset.lengths.astype(np.int64), kind="stable").astype(np.int64)
    parts = parts_in_turn(
        dataset.lengths[order].astype(np.int64),
        size=micro_batch_size,
        rank=rank,
        world_size=world_size,
    )
    return (make_micro_batch(part, rows=order, dataset=dataset, spec=spec) for part in parts)
