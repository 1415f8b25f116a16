"""A mixture of steps in blocks: each task gets its share of every block, as near as can be.

How often a task comes in a block follows from its share by largest remainder, and what a block owes
a task is paid in the next one, so that counts never drift from the shares. Within a block, smooth
weighted round robin spreads each task evenly; a rotation by (seed, block) keeps the pattern from
repeating. All of it is integer arithmetic on shares rounded once, and the counts at the start of
each block are a table: a lookup costs the same at any step.

This module never imports torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

# Any change of what task_of returns needs a new version: it is part of the mixture's state, and the
# golden vectors in tests/property/test_mixtures.py hold it in place.
MIXTURE_ALGORITHM_VERSION = 1

BLOCK_STEPS = 256
# Blocks after which a mixture of constant shares repeats its counts. Shares are rounded to
# multiples of 1 / (cycle * block steps), 4e-6 for blocks of 256 steps.
_CYCLE_BLOCKS = 1024
_CACHED_BLOCKS = 64

_Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Order:
    """The steps of a block before rotation.

    Attributes:
        tasks: the task of each step, int64 [block steps].
        before: steps of each task before each place, int64 [block steps + 1, tasks].
    """

    tasks: _Int64Array
    before: _Int64Array


class BlockMixture:
    """Gives each task its share of the steps.

    Args:
        shares: one list of shares by task for each block, sum 1 each; the last one stays.
        seed: rotates the blocks.
        block_steps: steps of a block.
        policy: what the shares come from, as JSON; part of the state.

    Raises:
        ValueError: there are no tasks or blocks, or a share is not positive.
    """

    def __init__(
        self,
        shares: Sequence[Sequence[float]],
        *,
        seed: int,
        block_steps: int = BLOCK_STEPS,
        policy: Mapping[str, Any],
    ) -> None:
        if not shares or not shares[0] or len({len(row) for row in shares}) != 1:
            raise ValueError(
                "a mixture needs at least one block of shares with at least 1 task, as many in "
                f"each block, got blocks of {sorted({len(row) for row in shares})} tasks"
            )
        self._seed = seed
        self._steps = block_steps
        self._policy = dict(policy)
        parts = [_whole_parts(row, total=_CYCLE_BLOCKS * block_steps) for row in shares]
        self._shares_sha256 = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        # The blocks with changing shares, then one cycle of those that stay.
        self._ramp = _count_table(parts[:-1], tasks=len(parts[0]), block_steps=block_steps)
        self._last = parts[-1]

    @cached_property
    def _cycle(self) -> _Int64Array:
        # Only when it is needed, as it costs far more than the few blocks before.
        return _count_table([self._last] * _CYCLE_BLOCKS, tasks=self.tasks, block_steps=self._steps)

    @property
    def tasks(self) -> int:
        """How many tasks are mixed."""
        return len(self._last)

    def task_of(self, step: int) -> int:
        """Returns the index of the step's task."""
        block, place = self._place(step)
        order = _block_order(self._counts(block), self._steps)
        return int(order.tasks[(place + self._rotation(block)) % self._steps])

    def steps_before(self, step: int) -> tuple[int, ...]:
        """Returns how many of the steps before `step` each task had."""
        block, place = self._place(step)
        before = _block_order(self._counts(block), self._steps).before
        turned = self._rotation(block)
        end = turned + place
        inside = before[min(end, self._steps)] - before[turned]
        if end > self._steps:
            inside = inside + before[end - self._steps]
        return tuple((self._before_block(block) + inside).tolist())

    def shares_at(self, step: int) -> tuple[float, ...]:
        """Returns the share of each task in the step's block, as drawn."""
        counts = self._counts(self._place(step)[0])
        return tuple(count / self._steps for count in counts)

    def state(self) -> dict[str, object]:
        """Returns what the mixture depends on, as JSON, to be compared on resume."""
        return {
            **self._policy,
            "version": MIXTURE_ALGORITHM_VERSION,
            "tasks": self.tasks,
            "seed": self._seed,
            "block_steps": self._steps,
            "shares_sha256": self._shares_sha256,
        }

    def _place(self, step: int) -> tuple[int, int]:
        if step < 0:
            raise ValueError(f"a step must not be negative, got {step}")
        return divmod(step, self._steps)

    def _before_block(self, block: int) -> _Int64Array:
        """Returns the steps of each task before a block, int64 [tasks]."""
        changing = len(self._ramp) - 1
        if block <= changing:
            return self._ramp[block]
        cycles, rest = divmod(block - changing, _CYCLE_BLOCKS)
        return self._ramp[-1] + cycles * self._cycle[-1] + self._cycle[rest]

    def _counts(self, block: int) -> tuple[int, ...]:
        return tuple((self._before_block(block + 1) - self._before_block(block)).tolist())

    def _rotation(self, block: int) -> int:
        digest = hashlib.blake2b(
            f"{self._seed}|{block}".encode(), digest_size=8, person=b"dist_ft.mixture"
        ).digest()
        return int.from_bytes(digest, "little") % self._steps


def _whole_parts(shares: Sequence[float], *, total: int) -> list[int]:
    """Returns shares as whole parts of `total`, at least 1 each, by largest remainder."""
    if not all(share > 0 for share in shares) or abs(math.fsum(shares) - 1) > 1e-6:
        raise ValueError(f"the shares of a mixture must be positive with sum 1, got {list(shares)}")
    # Rounded first, so that another machine's last bit of a power makes no difference.
    wants = [round(share * total * 2**20) for share in shares]
    parts = [max(1, want >> 20) for want in wants]
    over = [want - (part << 20) for want, part in zip(wants, parts, strict=True)]
    return _settle(parts, over=over, to=total, least=1)


def _settle(counts: Sequence[int], *, over: Sequence[int], to: int, least: int) -> list[int]:
    """Returns the counts with sum `to`: largest remainders get one more, smallest one less."""
    assert least * len(counts) <= to
    settled = list(counts)
    order = sorted(range(len(settled)), key=lambda task: (-over[task], task))
    for task in order[: max(0, to - sum(settled))]:
        settled[task] += 1
    excess = sum(settled) - to
    for task in itertools.cycle(reversed(order)):
        if excess <= 0:
            break
        # A task that is ahead already may have nothing to give.
        if settled[task] > least:
            settled[task] -= 1
            excess -= 1
    return settled


def _count_table(
    parts: Sequence[Sequence[int]], *, tasks: int, block_steps: int
) -> npt.NDArray[np.int64]:
    """Returns the steps of each task before each block, int64 [blocks + 1, tasks].

    Args:
        parts: each block's shares in parts of _CYCLE_BLOCKS * block_steps.
        tasks: how many tasks there are.
        block_steps: steps of a block.
    """
    before = np.zeros((len(parts) + 1, tasks), dtype=np.int64)
    # What each task is owed, in parts of a step.
    owed = [0] * tasks
    given = [0] * tasks
    for block, shares in enumerate(parts, start=1):
        owed = [debt + share for debt, share in zip(owed, shares, strict=True)]
        counts = [max(0, debt // _CYCLE_BLOCKS) for debt in owed]
        over = [d - c * _CYCLE_BLOCKS for d, c in zip(owed, counts, strict=True)]
        counts = _settle(counts, over=over, to=block_steps, least=0)
        owed = [d - c * _CYCLE_BLOCKS for d, c in zip(owed, counts, strict=True)]
        given = [total + count for total, count in zip(given, counts, strict=True)]
        before[block] = given
    return before


@lru_cache(maxsize=_CACHED_BLOCKS)
def _block_order(counts: tuple[int, ...], block_steps: int) -> _Order:
    """Returns the order of a block by smooth weighted round robin (as in nginx's load balancer)."""
    weights = np.array(counts, dtype=np.int64)
    current = np.zeros_like(weights)
    tasks = np.empty(block_steps, dtype=np.int64)
    for step in range(block_steps):
        current += weights
        # The first of equals: argmax says so.
        tasks[step] = chosen = int(current.argmax())
        current[chosen] -= block_steps
    before = np.zeros((block_steps + 1, len(counts)), dtype=np.int64)
    before[1:] = np.cumsum(tasks[:, None] == np.arange(len(counts)), axis=0)
    return _Order(tasks, before)
