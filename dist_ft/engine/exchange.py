"""Sums and gathers vectors of which every rank owns a part, by messages from rank to rank.

gloo's collectives copy what they send and receive, and an all-reduce sends to every rank what only
one of them keeps. Here what is large goes from where it is to where it belongs, and what is small
goes in one message to each rank.

A GPU's weights are gathered by a collective, and its gradients are summed by DeepSpeed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Elements from which on a vector is sent by itself: to copy it costs more than one more message.
_LARGE = 1 << 17

Finish = Callable[[], None]


def swap(
    sent: Mapping[int, Sequence[Tensor]], received: Mapping[int, Sequence[Tensor]], *, group: Any
) -> Finish:
    """Begin to send vectors to other ranks and to receive theirs.

    Args:
        sent: Contiguous vectors by the rank of `group` that gets them, not to be written to before
            the end. Those below `_LARGE` elements are copied now.
        received: Where to put what each rank sends here: as many vectors of the same lengths and
            type as that rank names, in its order.
        group: The process group. All ranks must begin their exchanges in the same order.

    Returns:
        What waits until everything is sent and received; to be called once.

    Raises:
        RuntimeError: Now or at the end, if a rank is gone or the group's timeout has passed.
    """
    _end_abandoned()
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    works: list[Any] = []
    packed: list[tuple[Tensor, list[Tensor]]] = []
    for distance in range(1, world_size):
        # Every rank begins with another peer, so that no rank is waited for by all at once.
        source, target = (rank - distance) % world_size, (rank + distance) % world_size
        small, large = _by_size(received.get(source, ()))
        if small:
            buffer = small[0].new_empty(sum(v.numel() for v in small))
            packed.append((buffer, small))
            large.insert(0, buffer)
        works += [dist.irecv(v, group=group, group_src=source) for v in large]
        small, large = _by_size(sent.get(target, ()))
        if small:
            large.insert(0, torch.cat(small))
        works += [dist.isend(v, group=group, group_dst=target) for v in large]

    return _Begun(works, packed)


class _Begun:
    """Messages under way; called once, it waits for them."""

    def __init__(
        self, works: Sequence[Any], packed: Sequence[tuple[Tensor, Sequence[Tensor]]]
    ) -> None:
        self._works, self._packed = works, packed

    def __call__(self) -> None:
        for work in self._works:
            work.wait()
        self._works = ()
        for buffer, vectors in self._packed:
            sizes = [v.numel() for v in vectors]
            for vector, part in zip(vectors, buffer.split(sizes), strict=True):
                vector.copy_(part)

    def __del__(self) -> None:
        # gloo never gets past a message whose buffer is gone, and neither do its later ones: of an
        # engine that was let go without `close`, for example.
        if self._works:
            _ABANDONED.append(self._works)


# Messages that nobody waits for; kept until others of the same ranks begin.
_ABANDONED: list[Sequence[Any]] = []


def _end_abandoned() -> None:
    while _ABANDONED:
        for work in _ABANDONED.pop():
            with contextlib.suppress(RuntimeError):  # of a group that is gone
                work.wait()


def _by_size(vectors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    small = [v for v in vectors if 0 < v.numel() < _LARGE]
    return small, [v for v in vectors if v.numel() >= _LARGE]


def gather(vectors: Sequence[Tensor], *, group: Any) -> Finish:
    """Begin to fill vectors of which each rank has an equal share, in the order of the ranks.

    Args:
        vectors: Flat, of one type and on one device, filled in place; in each, this rank's share is
            up to date. Neither to be read nor written before the end.
        group: The process group. All ranks must begin their exchanges in the same order.

    Returns:
        What waits until the vectors are whole; to be called once.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if world_size == 1:
        return lambda: None
    shares = [v.split(v.numel() // world_size) for v in vectors if v.numel()]
    if not vectors[0].is_cpu:
        return _gather_at_once(vectors, shares=shares, group=group)
    others = [r for r in range(world_size) if r != rank]
    own = [s[rank] for s in shares]
    return swap(
        dict.fromkeys(others, own), {r: [s[r] for s in shares] for r in others}, group=group
    )


def _gather_at_once(
    vectors: Sequence[Tensor], *, shares: Sequence[Sequence[Tensor]], group: Any
) -> Finish:
    """Do as `gather` by one collective."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    own = [s[rank] for s in shares]
    if len(vectors) == 1:
        whole, mine = vectors[0], own[0]
    else:
        mine = torch.cat(own)
        whole = mine.new_empty(world_size * mine.numel())
    work: Any = dist.all_gather_into_tensor(whole, mine, group=group, async_op=True)

    def finish() -> None:
        work.wait()
        if len(vectors) > 1:
            sizes = [v.numel() for v in own]
            for source, received in enumerate(whole.chunk(world_size)):
                for share, part in zip(shares, received.split(sizes), strict=True):
                    share[source].copy_(part)

    return finish


def sum_at_owners(slices: Sequence[Sequence[Tensor]], *, group: Any) -> Callable[[], list[Tensor]]:
    """Begin to add up the slices that this rank owns over all ranks.

    The ranks are added in their order. Below fp32, the sum of more than two is rounded once.

    Args:
        slices: Contiguous vectors of one type in host memory, by the rank of `group` that owns
            them; of the same lengths on every rank. Never written to, as gradients may share their
            memory; nor must the caller before the end.
        group: The process group. All ranks must begin their exchanges in the same order.

    Returns:
        What waits for this rank's slices and returns their sums; to be called once.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    others = [r for r in range(world_size) if r != rank]
    own = slices[rank]
    received = {r: _like(own) for r in others}
    arrive = swap({r: slices[r] for r in others}, received, group=group)

    def finish() -> list[Tensor]:
        arrive()
        return [
            _sum([received[r][index] if r != rank else mine for r in range(world_size)], mine=rank)
            for index, mine in enumerate(own)
        ]

    return finish


def _like(vectors: Sequence[Tensor]) -> Sequence[Tensor]:
    if not vectors:
        return []
    sizes = [v.numel() for v in vectors]
    return vectors[0].new_empty(sum(sizes)).split(sizes)


def _sum(parts: Sequence[Tensor], *, mine: int) -> Tensor:
    """Return the sum of the ranks' parts, in their order, in the memory of another than `mine`."""
    if len(parts) == 1:
        return parts[0]
    result = parts[1 if mine == 0 else 0]
    first, second, *rest = parts
    if not rest:  # rounded as the sum in fp32 is
        return torch.add(first, second, out=result)
    total = torch.add(first.to(torch.promote_types(first.dtype, torch.float32)), second)
    for part in rest:
        total.add_(part)
    return result.copy_(total)
