"""The candidates of a depth search: contiguous blocks of the layer stack, and what a step costs.

The trainable block need not be the topmost: which one is best depends on how the data differ from
those of pre-training (Lee et al. 2023, "Surgical fine-tuning improves adaptation to distribution
shifts"). Nothing here trains anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from dist_ft.freezing.schedule import LayerOrder

# With more segments than this the search begins on a coarser grid: 6 make 22 candidates.
MOST_SEGMENTS = 6


@dataclass(frozen=True, order=True)
class Block:
    """Transformer blocks `lo` to `hi - 1` train; none if both are the number of blocks."""

    lo: int
    hi: int

    @property
    def depth(self) -> int:
        """The number of blocks that train."""
        return self.hi - self.lo

    def trainable(self, order: LayerOrder) -> tuple[str, ...]:
        """Return the layer groups that train: the block, what lies above the stack, the heads.

        The embeddings train if the lowest block does.
        """
        bottom = order.bottom if self.lo == 0 else ()
        return bottom + order.blocks[self.lo : self.hi] + order.top + order.heads

    def describe(self, total: int) -> str:
        """Return the block in words, for a stack of `total` blocks."""
        if self.depth == 0:
            return "heads only"
        if self.depth == total:
            return "everything"
        blocks = f"block {self.lo}" if self.depth == 1 else f"blocks {self.lo} to {self.hi - 1}"
        return f"embeddings, {blocks}" if self.lo == 0 else blocks


@dataclass(frozen=True)
class Space:
    """All candidates for a stack of transformer blocks.

    Attributes:
        sizes: Parameters of each transformer block, bottom to top.
        granule: A trainable block begins and ends at multiples of it, or at the top.
    """

    sizes: tuple[int, ...]
    granule: int = 1

    @property
    def total(self) -> int:
        """The number of transformer blocks."""
        return len(self.sizes)

    def granules(self) -> list[int]:
        """Return the granularities to search in turn, coarse to fine."""
        found = [self.granule]
        while self.total > MOST_SEGMENTS * found[0]:
            found.insert(0, 2 * found[0])
        return found

    def boundaries(self, granule: int) -> list[int]:
        """Return where a trainable block may begin or end."""
        return [*range(0, self.total, granule), self.total]

    def grid(self, granule: int) -> list[Block]:
        """Return every candidate of a granularity, heads only included."""
        ends = self.boundaries(granule)
        blocks = [Block(lo, hi) for lo, hi in product(ends, ends) if lo < hi]
        return [*blocks, Block(self.total, self.total)]

    def neighbours(self, block: Block, granule: int) -> list[Block]:
        """Return the candidates whose ends are one granule or less from those of `block`."""
        ends = self.boundaries(granule)
        near = {
            Block(lo, hi) if lo < hi else Block(self.total, self.total)
            for lo, hi in product(_around(ends, block.lo), _around(ends, block.hi))
            if lo <= hi
        }
        return sorted(near - {block})

    def cost(self, block: Block) -> float:
        """Return the arithmetic of a training step in units of one forward pass of the stack.

        A matrix product costs as much in the forward pass as for the gradient of its input and
        as for that of its weight. The forward pass goes through every block; the gradient comes
        down to the lowest trainable block, through frozen blocks above it too; gradients of
        weights are computed for trainable blocks alone. Each block counts by its parameters;
        embeddings (a look-up) and heads do not count.
        """
        everything = sum(self.sizes)
        down, own = sum(self.sizes[block.lo :]), sum(self.sizes[block.lo : block.hi])
        return 1.0 + (down + own) / everything if block.depth else 1.0

    def grid_cost(self) -> float:
        """Return the sum of `cost` over the finest grid."""
        return sum(self.cost(block) for block in self.grid(self.granule))


def _around(ends: Sequence[int], end: int) -> Iterable[int]:
    at = ends.index(end)
    return ends[max(0, at - 1) : at + 2]


def make_space(sizes: Sequence[int], *, granule: int) -> Space:
    """Return the candidates for blocks of these sizes.

    Raises:
        ValueError: If there is no stack, or the granule does not fit it.
    """
    if not sizes:
        raise ValueError("search: the model has no transformer blocks to choose from")
    if not 1 <= granule <= len(sizes):
        raise ValueError(
            f"--granule must be between 1 and the number of transformer blocks ({len(sizes)}), "
            f"got {granule}: choose a number in between"
        )
    return Space(tuple(sizes), granule)
