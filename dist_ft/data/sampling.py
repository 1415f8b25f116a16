"""The order of the data: which rows a step uses, as a pure function of (seed, step).

The rows of a task form an endless sequence of *slots*: slot ``t`` lies in epoch ``t // rows`` and
every epoch is a permutation of the rows. The permutation is a small cipher (a generalised Feistel
network on a grid, with cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
2002, sections 4 and 5), so that a slot's row is found without building, storing or replaying
anything. Nothing here depends on the
world size, on workers or on what was read before; the state of the order is the step.

No stream of numpy's or torch's generators is used: their shuffles are not versioned contracts.
This module never imports torch.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

# Any change of what row_at returns needs a new version: it is stored in manifests and checkpoints,
# and the golden vectors in tests/property/test_sampling.py hold it in place.
ORDER_ALGORITHM_VERSION = 1

# Three rounds are statistically indistinguishable from random at 200,000 rows; six leave a margin.
_ROUNDS = 6
# Rows of consecutive slots are found this many at once: for few, calling numpy costs more than the
# arithmetic.
_BLOCK = 4096
_CACHED_BLOCKS = 128

Int64Array = npt.NDArray[np.int64]
_UInt64Array = npt.NDArray[np.uint64]


def row_at(
    slots: npt.ArrayLike, *, rows: int, seed: int, task: str
) -> tuple[Int64Array, Int64Array]:
    """Returns (epochs, rows) of the slots: which epoch each slot lies in and which row it holds.

    Args:
        slots: non-negative slot numbers, int, [n]; any order, repeats allowed.
        rows: how many rows the task's data set has.
        seed: the run's seed.
        task: the task's name; tasks with the same size still get different orders.

    Returns:
        Two int64 arrays [n]. Over the slots [e * rows, (e + 1) * rows) of an epoch e every row
        comes exactly once.

    Raises:
        ValueError: `rows` is not positive, or a slot is negative.
    """
    if rows < 1:
        raise ValueError(
            f"rows must be at least 1, got {rows} for task {task!r}: an empty data set has no order"
        )
    slot_array = np.asarray(slots, dtype=np.int64)
    if slot_array.size and int(slot_array.min()) < 0:
        raise ValueError(f"slots must not be negative, got {int(slot_array.min())} (task {task!r})")
    epochs, positions = np.divmod(slot_array, np.int64(rows))
    keys = _round_keys(epochs, seed=seed, task=task)
    return epochs, _permute(positions.astype(np.uint64), rows=rows, keys=keys).astype(np.int64)


def rows_between(
    first: int, end: int, *, rows: int, seed: int, task: str
) -> tuple[Int64Array, Int64Array]:
    """Returns (epochs, rows) of the slots [first, end), as `row_at` does, but quicker in a run.

    Args:
        first: a slot, not negative.
        end: the slot after the last one.
        rows: how many rows the task's data set has.
        seed: the run's seed.
        task: the task's name.

    Raises:
        ValueError: `rows` is not positive, or a slot is negative.
    """
    numbers = range(first // _BLOCK, -(-end // _BLOCK))
    found = [_block_rows(number, rows, seed, task) for number in numbers]
    inside = slice(first - numbers.start * _BLOCK, end - numbers.start * _BLOCK)
    if len(found) == 1:
        return found[0][0][inside], found[0][1][inside]
    epochs, places = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return epochs[inside], places[inside]


@lru_cache(maxsize=_CACHED_BLOCKS)
def _block_rows(block: int, rows: int, seed: int, task: str) -> tuple[Int64Array, Int64Array]:
    slots = np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.int64)
    found = row_at(slots, rows=rows, seed=seed, task=task)
    for values in found:
        values.flags.writeable = False
    return found


def _round_keys(epochs: Int64Array, *, seed: int, task: str) -> _UInt64Array:
    """Returns the keys of the Feistel rounds, uint64 [rounds, n], from each slot's epoch."""
    distinct, inverse = np.unique(epochs, return_inverse=True)
    digests = b"".join(
        # The numbers come first, so that no task name can imitate another seed or epoch.
        hashlib.blake2b(
            f"{seed}|{int(epoch)}|{task}".encode(), digest_size=8 * _ROUNDS, person=b"dist_ft.order"
        ).digest()
        for epoch in distinct
    )
    keys = np.frombuffer(digests, dtype="<u8").astype(np.uint64).reshape(-1, _ROUNDS)
    return keys[inverse.reshape(-1)].T


def _permute(positions: _UInt64Array, *, rows: int, keys: _UInt64Array) -> _UInt64Array:
    """Returns the permuted positions, uint64 [n], each below `rows`."""
    # The cipher permutes a grid of height * width >= rows cells, fewer than `height` too many.
    height = math.isqrt(rows - 1) + 1
    width = -(-rows // height)
    result = _feistel(positions, keys=keys, height=height, width=width)
    outside = np.flatnonzero(result >= rows)
    # Walking on from a cell too many until a row is hit keeps it a bijection.
    while outside.size:
        result[outside] = _feistel(
            result[outside], keys=keys[:, outside], height=height, width=width
        )
        outside = outside[result[outside] >= rows]
    return result


def _feistel(values: _UInt64Array, *, keys: _UInt64Array, height: int, width: int) -> _UInt64Array:
    tall, wide = np.uint64(height), np.uint64(width)
    left, right = np.divmod(values, wide)
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        left = (left + _mix(right + first) % tall) % tall
        right = (right + _mix(left + second) % wide) % wide
    return left * wide + right


def _mix(values: _UInt64Array) -> _UInt64Array:
    """Returns the splitmix64 finaliser of the values (Steele et al., OOPSLA 2014, figure 16)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Mixture(Protocol):
    """Which task each step works on, as a pure function of the step."""

    @property
    def tasks(self) -> int:
        """How many tasks are mixed; a task is named by its place in the recipe."""
        ...

    def task_of(self, step: int) -> int:
        """Returns the index of the step's task."""
        ...

    def steps_before(self, step: int) -> tuple[int, ...]:
        """Returns how many of the steps before `step` each task had."""
        ...

    def state(self) -> dict[str, object]:
        """Returns what the mixture depends on, as JSON, to be compared on resume."""
        ...


@dataclass(frozen=True)
class RoundRobin:
    """Steps take the tasks in turn, in the recipe's order."""

    tasks: int

    def __post_init__(self) -> None:
        if self.tasks < 1:
            raise ValueError(f"a mixture needs at least 1 task, got {self.tasks}")

    def task_of(self, step: int) -> int:
        """Returns the index of the step's task."""
        _check_step(step)
        return step % self.tasks

    def steps_before(self, step: int) -> tuple[int, ...]:
        """Returns how many of the steps before `step` each task had."""
        _check_step(step)
        return tuple((step + self.tasks - 1 - task) // self.tasks for task in range(self.tasks))

    def state(self) -> dict[str, object]:
        """Returns what the mixture depends on."""
        return {"type": "round_robin", "tasks": self.tasks}


def step_slots(step: int, *, mixture: Mixture, global_batch_size: int) -> tuple[int, Int64Array]:
    """Returns the task index of a step and the slots of that task it uses.

    Args:
        step: the optimizer step, from 0.
        mixture: assigns the steps to the tasks.
        global_batch_size: rows of one step over all ranks, G.

    Returns:
        The task's index k and the slots [c * G, (c + 1) * G), int64 [G], where c counts the
        earlier steps of task k.
    """
    task = mixture.task_of(step)
    first = mixture.steps_before(step)[task] * global_batch_size
    return task, np.arange(first, first + global_batch_size, dtype=np.int64)


def _check_step(step: int) -> None:
    if step < 0:
        raise ValueError(f"a step must not be negative, got {step}")
