"""Planned batches: inside a step's fixed rows, micro-batches and ranks are laid out by length.

Rows of like length share a micro-batch, so that there is little padding, and all micro-batches cost
about the same, so that the ranks need not wait for each other. The plan is made first, from the
lengths alone, and the micro-batches are then dealt to the ranks: what a micro-batch holds doesn't
depend on the world size. It is integer arithmetic on the step's lengths, so all ranks find the same
plan without talking.

This module never imports torch.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_ft.data.packing import first_fit

Int64Array = npt.NDArray[np.int64]

# Costs are whole numbers of 2**-16 tokens.
_TOKEN = 1 << 16
# The search for the smallest bound on a micro-batch's cost stops within this share of it.
_BOUND_PRECISION = 2048


@dataclass(frozen=True)
class LengthPlan:
    """How rows are laid out by length.

    A micro-batch of n rows padded to L tokens is taken to cost n * L * (1 + attention_cost * L).

    Attributes:
        attention_cost: how much a token costs more for each token of the row it attends to; about
            1 / (6 * hidden size): a transformer block has 24 h**2 multiplications a token, its
            attention 4 L h.
        max_tokens: the most tokens of a micro-batch, padding counted. The step is divided into as
            many micro-batches as that takes, but into no fewer than global_batch_size /
            micro_batch_size: set both sizes equal to let the budget alone decide.
        multiple_of: the number of micro-batches is rounded up to a multiple of this. With the
            largest world size in use, or a multiple of it, no rank gets fillers.
        packed: the blocks run a micro-batch without padding, so that its cost is the sum of the
            rows' costs, and max_tokens counts no padding.
    """

    attention_cost: float = 1 / 4096
    max_tokens: int | None = None
    multiple_of: int = 1
    packed: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.attention_cost <= 1:
            raise ValueError(f"attention_cost must lie in [0, 1], got {self.attention_cost}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.multiple_of < 1:
            raise ValueError(f"multiple_of must be at least 1, got {self.multiple_of}")

    def row_costs(self, lengths: Int64Array) -> Int64Array:
        """Returns the cost of rows of these lengths, alone or padded to them, int64 [n]."""
        return lengths * (_TOKEN + round(self.attention_cost * _TOKEN) * lengths)


@dataclass(frozen=True)
class PlannedStep:
    """The micro-batches of a step.

    Attributes:
        micro_batches: places in the step's rows, int64 [rows of the micro-batch] each, longest row
            first; every place is in exactly one of them.
        costs: what each costs, int64 [micro-batches], in arbitrary units.
    """

    micro_batches: tuple[Int64Array, ...]
    costs: Int64Array


def plan_step(lengths: npt.ArrayLike, *, micro_batches: int, plan: LengthPlan) -> PlannedStep:
    """Returns the micro-batches of a step; a pure function of the lengths.

    Args:
        lengths: tokens of the step's rows, int [rows].
        micro_batches: how many micro-batches to make, unless the plan's budget or `multiple_of`
            asks for more; there are never more than rows.
        plan: the cost model and the budget.

    Raises:
        ValueError: there are fewer rows than micro-batches, or a row is longer than the budget.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if not 1 <= micro_batches <= len(sizes):
        raise ValueError(
            f"{len(sizes)} rows can't be divided into {micro_batches} micro-batches: there must be "
            "at least 1 and no more than rows"
        )
    if plan.max_tokens is not None and int(sizes.max()) > plan.max_tokens:
        raise ValueError(
            f"a row has {int(sizes.max())} tokens, more than max_tokens {plan.max_tokens}: raise "
            "max_tokens or prepare the data with a smaller max_length"
        )
    # Stable, so that every rank finds the same order.
    order = np.argsort(-sizes, kind="stable").astype(np.int64)
    if plan.packed:
        groups = _packed_groups(sizes[order], least=micro_batches, plan=plan)
        costs = [int(plan.row_costs(sizes[order[group]]).sum()) for group in groups]
    else:
        groups = _padded_groups(sizes[order], least=micro_batches, plan=plan)
        costs = [len(group) * int(plan.row_costs(sizes[order[group[:1]]])[0]) for group in groups]
    return PlannedStep(tuple(order[group] for group in groups), np.array(costs, dtype=np.int64))


def deal(costs: npt.ArrayLike, *, world_size: int) -> list[list[int | None]]:
    """Returns each rank's micro-batches, equally many and of about equal cost.

    In rounds of one micro-batch a rank, costliest round first, so that ranks also have similar
    micro-batches at the same time, which matters where each forward is collective. In a round, the
    rank with the least so far gets the costliest.

    Args:
        costs: cost of each micro-batch, int [M].
        world_size: how many ranks there are, W.

    Returns:
        For each rank ceil(M / W) numbers of micro-batches; None is a filler.

    Raises:
        ValueError: `world_size` is not positive.
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    values = np.asarray(costs, dtype=np.int64)
    order = np.argsort(-values, kind="stable").tolist()
    loads = [0] * world_size
    dealt: list[list[int | None]] = [[] for _ in range(world_size)]
    for first in range(0, len(order), world_size):
        ranks = sorted(range(world_size), key=lambda rank: (loads[rank], rank))
        hand: list[int | None] = [*order[first : first + world_size]]
        hand += [None] * (world_size - len(hand))
        for rank, number in zip(ranks, hand, strict=True):
            dealt[rank].append(number)
            loads[rank] += 0 if number is None else int(values[number])
    return dealt


def _rounded(count: int, *, plan: LengthPlan, rows: int) -> int:
    return min(rows, -(-count // plan.multiple_of) * plan.multiple_of)


def _padded_groups(sizes: Int64Array, *, least: int, plan: LengthPlan) -> list[Int64Array]:
    """Returns runs of the rows, which are sorted from long to short."""
    # Plain integers, as the search looks at few of them, again and again.
    costs: list[int] = plan.row_costs(sizes).tolist()
    # As many rows of a length as the budget allows.
    widest = [len(costs)] * len(costs)
    if plan.max_tokens is not None:
        widest = (plan.max_tokens // sizes).tolist()
        least = max(least, len(_runs(costs, bound=costs[0] * len(costs), widest=widest)))
    count = _rounded(least, plan=plan, rows=len(costs))
    # The smallest bound under which `count` micro-batches are enough makes them equally costly.
    # Padding only adds to what all rows cost, and the first row costs most.
    low, high = max(costs[0], sum(costs) // count), costs[0] * len(costs)
    while high - low > low // _BOUND_PRECISION:
        bound = (low + high) // 2
        if len(_runs(costs, bound=bound, widest=widest)) <= count:
            high = bound
        else:
            low = bound + 1
    starts = _runs(costs, bound=high, widest=widest)
    return _split(starts, costs=np.array(costs), count=count)


def _runs(costs: list[int], *, bound: int, widest: list[int]) -> list[int]:
    """Returns the first row of each run if each is as long as the bound on its cost allows."""
    starts: list[int] = []
    place = 0
    while place < len(costs):
        starts.append(place)
        place += max(1, min(widest[place], bound // costs[place]))
    return starts


def _split(starts: list[int], *, costs: Int64Array, count: int) -> list[Int64Array]:
    """Returns `count` runs: those with the most padding are cut in two."""
    ends = [*starts[1:], len(costs)]
    queue = [_best_cut(costs, start=s, end=e) for s, e in zip(starts, ends, strict=True)]
    heapq.heapify(queue)
    while len(queue) < count:
        _, start, cut, end = heapq.heappop(queue)
        heapq.heappush(queue, _best_cut(costs, start=start, end=cut))
        heapq.heappush(queue, _best_cut(costs, start=cut, end=end))
    runs = sorted((start, end) for _, start, _, end in queue)
    return [np.arange(start, end) for start, end in runs]


def _best_cut(costs: Int64Array, *, start: int, end: int) -> tuple[int, int, int, int]:
    """Returns (minus what is saved, start, cut, end) for the cut of a run that saves most."""
    if end - start < 2:
        return 1, start, end, end
    inside = np.arange(start + 1, end)
    saved = (end - inside) * (costs[start] - costs[inside])
    best = int(saved.argmax())
    return -int(saved[best]), start, int(inside[best]), end


def _packed_groups(sizes: Int64Array, *, least: int, plan: LengthPlan) -> list[Int64Array]:
    if plan.max_tokens is None:
        return _balanced(sizes, count=_rounded(least, plan=plan, rows=len(sizes)), plan=plan)
    # First fit says how few can do; equal costs may need a little more room.
    least = max(least, len(first_fit(sizes, capacity=plan.max_tokens)))
    while True:
        groups = _balanced(sizes, count=_rounded(least, plan=plan, rows=len(sizes)), plan=plan)
        if max(int(sizes[group].sum()) for group in groups) <= plan.max_tokens:
            return groups
        least = len(groups) + 1


def _balanced(sizes: Int64Array, *, count: int, plan: LengthPlan) -> list[Int64Array]:
    """Returns groups of equal cost: each row, longest first, goes where the least is so far."""
    groups: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for place, cost in enumerate(plan.row_costs(sizes).tolist()):
        load, number = heapq.heappop(loads)
        groups[number].append(place)
        heapq.heappush(loads, (load + cost, number))
    return [np.array(group, dtype=np.int64) for group in groups]
