"""Which elements of which parameter a rank owns, for every ZeRO stage: a pure function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A run of a parameter inside a rank's flat partition of a parameter group.

    Attributes:
        parameter: Name of the parameter.
        start: First element of the flattened parameter.
        length: Number of elements.
        offset: Where the run begins in the rank's flat partition.
    """

    parameter: str
    start: int
    length: int
    offset: int


def owned_pieces(
    sizes: Sequence[tuple[str, int]], *, zero_stage: int, rank: int, world_size: int
) -> list[Piece]:
    """Return what `rank` owns of a parameter group, in the order of its flat partition.

    Stage 0 replicates everything. Stages 1 and 2 lay the group's parameters end to end, pad the
    end to a multiple of twice the world size and cut the vector into equal partitions. Stage 3
    cuts every parameter by itself, padding each to a multiple of the world size.

    Args:
        sizes: Name and number of elements of each parameter, in the group's order.
        zero_stage: 0 to 3.
        rank: Whose partition.
        world_size: Number of data-parallel ranks.
    """
    if zero_stage == 0:
        return list(_window(sizes, begin=0, end=sum(n for _, n in sizes)))
    if zero_stage in (1, 2):
        size = partition_numel(sizes, zero_stage=zero_stage, world_size=world_size)
        return list(_window(sizes, begin=rank * size, end=(rank + 1) * size))
    pieces: list[Piece] = []
    offset = 0
    for name, numel in sizes:
        part = -(-numel // world_size)
        length = max(0, min(part, numel - rank * part))
        if length:
            pieces.append(Piece(name, rank * part, length, offset))
        offset += part
    return pieces


def partition_numel(sizes: Sequence[tuple[str, int]], *, zero_stage: int, world_size: int) -> int:
    """Return the elements of one rank's flat partition of the group, padding included."""
    if zero_stage == 0:
        return sum(n for _, n in sizes)
    if zero_stage in (1, 2):
        alignment = 2 * world_size
        return -(-sum(n for _, n in sizes) // alignment) * alignment // world_size
    return sum(-(-n // world_size) for _, n in sizes)


def fair_share(
    sizes: Sequence[tuple[str, int]], *, rank: int, world_size: int
) -> list[tuple[str, int, int]]:
    """Return (parameter, start, length) of the part that `rank` writes of replicated values."""
    pieces = owned_pieces(sizes, zero_stage=1, rank=rank, world_size=world_size)
    return [(p.parameter, p.start, p.length) for p in pieces]


def _window(sizes: Sequence[tuple[str, int]], *, begin: int, end: int) -> Iterator[Piece]:
    position = 0
    for name, numel in sizes:
        first, last = max(begin, position), min(end, position + numel)
        if first < last:
            yield Piece(name, first - position, last - first, first - begin)
        position += numel
