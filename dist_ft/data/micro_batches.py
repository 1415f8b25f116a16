"""Micro-batches: which rows share one, which rank gets it, and its tensors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dist_ft.data.collate import CollateSpec, collate, kept_columns
from dist_ft.data.planning import LengthPlan, deal, plan_step
from dist_ft.data.shards import Columns, ShardedDataset

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
        layout: lays the step's rows out by length; then `micro_batch_size` is the mean rows of a
            micro-batch. By default micro-batches take the rows in order.
    """

    global_batch_size: int
    micro_batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    layout: LengthPlan | None = None

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
        check_rank(self.rank, world_size=self.world_size)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one step over all ranks, M; fillers not counted.

        A layout with a budget or `multiple_of` may make more of them.
        """
        return self.global_batch_size // self.micro_batch_size

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of one step on each rank, fillers counted; see `micro_batches`."""
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
        distinct: whether no other micro-batch of the step, on any rank, has one of the rows.
        variants: which augmented version of each row this is, int64 [n]; None if the versions are
            not numbered: rows are not augmented, or each epoch anew.
    """

    inputs: dict[str, torch.Tensor]
    targets: dict[str, torch.Tensor]
    kept: dict[str, list[Any]]
    rows: Int64Array
    index: int
    tokens: int
    loss_weight: float
    distinct: bool = True
    variants: Int64Array | None = None

    def pin(self) -> None:
        """Moves the tensors into page-locked memory."""
        self.inputs = {name: tensor.pin_memory() for name, tensor in self.inputs.items()}
        self.targets = {name: tensor.pin_memory() for name, tensor in self.targets.items()}


@dataclass(frozen=True)
class Part:
    """One micro-batch before it is read.

    Attributes:
        index: its number in the step.
        places: its rows, as places in the step's rows, int64 [n]; a filler repeats one of another
            micro-batch.
        filler: whether it only keeps the ranks in step.
    """

    index: int
    places: Int64Array
    filler: bool


def parts_in_turn(lengths: Int64Array, *, size: int, rank: int, world_size: int) -> list[Part]:
    """Returns a rank's micro-batches of `size` rows each, in the order of the rows.

    Micro-batch j goes to rank j % W; fillers make the ranks even.

    Args:
        lengths: tokens of all ranks' rows, int [rows].
        size: rows of one micro-batch.
        rank: this process, from 0.
        world_size: how many processes share the rows, W.
    """
    count = -(-len(lengths) // size)
    return [
        _filler(index, lengths=lengths)
        if index >= count
        else Part(index, np.arange(index * size, min((index + 1) * size, len(lengths))), False)
        for index in range(rank, -(-count // world_size) * world_size, world_size)
    ]


def parts_by_length(
    lengths: Int64Array, *, count: int, plan: LengthPlan, rank: int, world_size: int
) -> list[Part]:
    """Returns a rank's micro-batches, laid out by length and dealt for equal work.

    Args:
        lengths: tokens of the step's rows, int [rows].
        count: how many micro-batches to make at least, M.
        plan: cost model and budget.
        rank: this process, from 0.
        world_size: how many processes share the step, W.

    Raises:
        ValueError: a row is longer than the budget.
    """
    planned = plan_step(lengths, micro_batches=count, plan=plan)
    dealt = deal(planned.costs, world_size=world_size)
    # A rank has at most one filler, so the rank keeps their numbers apart.
    return [
        _filler(len(planned.micro_batches) + rank, lengths=lengths)
        if number is None
        else Part(number, planned.micro_batches[number], False)
        for number in dealt[rank]
    ]


def _filler(index: int, *, lengths: Int64Array) -> Part:
    # A filler needs some valid row of the same task, so that the rank runs the same modules; the
    # shortest one costs least.
    return Part(index, np.array([int(np.argmin(lengths))], dtype=np.int64), True)


def make_micro_batch(
    part: Part,
    *,
    rows: Int64Array,
    dataset: ShardedDataset,
    spec: CollateSpec,
    columns: Columns | None = None,
) -> MicroBatch:
    """Returns the tensors of a micro-batch.

    Args:
        part: which rows it has.
        rows: the rows that `part` counts in, int64.
        dataset: where they are.
        spec: columns and padding.
        columns: the columns of the part's rows, by default as they are in the data set.

    Raises:
        ValueError: a row can't be read, naming shard and rows.
    """
    own = rows[part.places]
    try:
        if columns is None:
            columns = dataset.take(own, columns=spec.columns)
        inputs, targets = collate(columns, spec)
        kept = kept_columns(columns, spec)
    except ValueError as error:
        raise ValueError(f"{place_of(own, dataset=dataset)}: {error}") from error
    if part.filler:
        tokens = 0
    elif "input_ids" in columns:
        # Augmented rows have other lengths than the data set says.
        tokens = sum(map(len, columns["input_ids"]))
    else:
        tokens = int(dataset.lengths[own].sum(dtype=np.int64))
    return MicroBatch(
        inputs=inputs,
        targets=targets,
        kept=kept,
        rows=own,
        index=part.index,
        tokens=tokens,
        loss_weight=0.0 if part.filler else 1.0,
        distinct=not part.filler,
    )


def read_parts(
    parts: Sequence[Part], *, rows: Int64Array, dataset: ShardedDataset, spec: CollateSpec
) -> list[Columns]:
    """Returns the columns of each part, all read at once, as that costs half as much.

    Args:
        parts: which rows each part has.
        rows: the rows that the parts count in, int64.
        dataset: where they are.
        spec: says which columns.

    Raises:
        ValueError: a row can't be read, naming shard and rows.
    """
    own = rows[np.concatenate([part.places for part in parts])]
    try:
        columns = dataset.take(own, columns=spec.columns)
    except ValueError as error:
        raise ValueError(f"{place_of(own, dataset=dataset)}: {error}") from error
    ends = list(itertools.accumulate(len(part.places) for part in parts))
    return [
        {name: values[end - len(part.places) : end] for name, values in columns.items()}
        for part, end in zip(parts, ends, strict=True)
    ]


def place_of(rows: Int64Array, *, dataset: ShardedDataset) -> str:
    """Returns rows, folder and shards for an error message."""
    shards = sorted({dataset.shard_of(int(row)) for row in rows})
    numbers = ", ".join(str(int(row)) for row in rows[:8]) + (", ..." if len(rows) > 8 else "")
    return f"rows {numbers} of {dataset.folder} ({', '.join(shards[:4])})"


def check_rank(rank: int, *, world_size: int) -> None:
    """Checks that a rank is one of the world's.

    Raises:
        ValueError: it is not.
    """
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank must lie in [0, world_size), got rank {rank} and world_size {world_size}"
        )
