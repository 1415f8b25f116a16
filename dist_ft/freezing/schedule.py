"""Schedules of freezing that are known before the run: which layer groups train from which step.

A phase is data: an ordered set of layer groups. Everything here is a pure function of the layer
groups and the recipe's numbers, so it costs nothing to resume at any step and nothing can
disagree between ranks. Group names come bottom to top, heads last.
"""

from __future__ import annotations

import fnmatch
import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """What trains from a step on.

    Attributes:
        index: Number of the phase in the run, from 0.
        start_step: First optimizer step of the phase.
        trainable: Layer groups that train, bottom to top.
    """

    index: int
    start_step: int
    trainable: tuple[str, ...]

    def fingerprint(self) -> int:
        """Return a 62-bit hash of what trains, equal on all ranks that agree."""
        return trainable_fingerprint(self.trainable)


def trainable_fingerprint(trainable: Sequence[str]) -> int:
    """Return a 62-bit hash of a set of layer groups, whatever its order."""
    text = "\n".join(sorted(trainable)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 2


@dataclass(frozen=True)
class LayerOrder:
    """The layer groups of a model as freezing sees them.

    Attributes:
        bottom: Groups below the first block (embeddings).
        blocks: Transformer blocks, bottom to top.
        top: Groups above the last block (final norm, pooler).
        heads: One per task.
    """

    bottom: tuple[str, ...]
    blocks: tuple[str, ...]
    top: tuple[str, ...]
    heads: tuple[str, ...]

    @classmethod
    def of(cls, groups: Sequence[tuple[str, str]]) -> LayerOrder:
        """Return the order of (name, kind) pairs that come bottom to top."""
        heads = tuple(name for name, kind in groups if kind == "head")
        # Parameters that no loss reaches never train.
        backbone = [(name, kind) for name, kind in groups if kind not in ("head", "unused")]
        at = [i for i, (_, kind) in enumerate(backbone) if kind == "block"]
        first, last = (at[0], at[-1]) if at else (len(backbone), len(backbone) - 1)
        names = [name for name, _ in backbone]
        return cls(
            bottom=tuple(names[:first]),
            blocks=tuple(names[first : last + 1]),
            top=tuple(names[last + 1 :]),
            heads=heads,
        )

    @property
    def everything(self) -> tuple[str, ...]:
        """All groups, bottom to top."""
        return self.bottom + self.blocks + self.top + self.heads

    def above(self, depth: int) -> tuple[str, ...]:
        """Return what trains when everything below the bottom `depth` blocks is frozen.

        Depth 0 trains everything; depth 1 freezes the embeddings and the lowest block; a depth
        equal to the number of blocks leaves the top and the heads.

        Raises:
            ValueError: If there are fewer blocks than `depth`.
        """
        if depth > len(self.blocks):
            raise ValueError(
                f"freezing.depth must be at most the number of blocks ({len(self.blocks)}), got "
                f"{depth}: lower it to {len(self.blocks)} to train the heads alone"
            )
        bottom = self.bottom if depth == 0 else ()
        return bottom + self.blocks[depth:] + self.top + self.heads

    def sorted(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the names bottom to top, each once."""
        wanted = set(names)
        return tuple(name for name in self.everything if name in wanted)

    def match(self, patterns: Sequence[str], *, where: str) -> tuple[str, ...]:
        """Return the groups that the shell patterns name, bottom to top.

        Args:
            patterns: Group names, possibly with ``*``; ``all`` is everything.
            where: The recipe key, for the error.

        Raises:
            ValueError: If a pattern names no group.
        """
        found: set[str] = set()
        for pattern in patterns:
            names = (
                list(self.everything)
                if pattern == "all"
                else fnmatch.filter(self.everything, pattern)
            )
            if not names:
                raise ValueError(
                    f"{where}: {pattern!r} names no layer group; the groups are "
                    f"{', '.join(self.everything)}"
                )
            found.update(names)
        return self.sorted(list(found))


def make_phases(starts: Sequence[tuple[int, Sequence[str]]], *, order: LayerOrder) -> list[Phase]:
    """Return phases from (start step, trainable groups), leaving out changes that change nothing.

    Raises:
        ValueError: If a phase trains nothing, or the steps do not begin at 0 and rise.
    """
    phases: list[Phase] = []
    for start, names in starts:
        trainable = order.sorted(list(names))
        if not trainable:
            raise ValueError(
                f"freezing: the phase that begins at step {start} trains nothing: "
                "leave at least one layer group trainable"
            )
        if not set(trainable) & set(order.heads) and not phases and len(order.heads) > 0:
            raise ValueError(
                f"freezing: the first phase trains no head ({', '.join(order.heads)}), whose "
                "weights are random: make the heads trainable"
            )
        expected = 0 if not phases else phases[-1].start_step + 1
        if start < expected or (not phases and start != 0):
            raise ValueError(
                f"freezing: phases begin at step 0 and their steps rise, got step {start} after "
                f"{phases[-1].start_step if phases else 'nothing'}: put the phases in order"
            )
        if phases and phases[-1].trainable == trainable:
            continue
        phases.append(Phase(len(phases), start, trainable))
    return phases


def gradual(
    order: LayerOrder, *, first: int, groups_per_phase: int, change_steps: Sequence[int]
) -> list[tuple[int, tuple[str, ...]]]:
    """Return top-down unfreezing (ULMFiT, Howard and Ruder 2018, section 3.3).

    Args:
        order: The layer groups.
        first: Blocks from the top that train in the first phase, besides the top and the heads.
        groups_per_phase: Blocks that each change adds; the embeddings come with the last block.
        change_steps: Steps of the changes; changes that would add nothing are left out.
    """
    total = len(order.blocks)
    starts: list[tuple[int, tuple[str, ...]]] = []
    for i, start in enumerate((0, *change_steps)):
        depth = max(0, total - first - i * groups_per_phase)
        starts.append((start, order.above(depth)))
        if depth == 0:
            break
    return starts


def bottom_up(
    order: LayerOrder, *, groups_per_phase: int, change_steps: Sequence[int], max_depth: int
) -> list[tuple[int, tuple[str, ...]]]:
    """Return progressive freezing from the bottom (FreezeOut, Brock et al. 2017)."""
    limit = min(max_depth, len(order.blocks))
    starts: list[tuple[int, tuple[str, ...]]] = [(0, order.everything)]
    for i, start in enumerate(change_steps):
        depth = min(limit, (i + 1) * groups_per_phase)
        starts.append((start, order.above(depth)))
        if depth == limit:
            break
    return starts


@dataclass(frozen=True)
class BlockDraw:
    """Trains a few blocks at a time, drawn or in turn, as a pure function of the period.

    LISA (Pan et al. 2024) draws them at random; BAdam (Luo et al. 2024) takes them in turn.

    Attributes:
        order: The layer groups.
        blocks: Blocks that train at a time.
        every: Steps of a period.
        kind: ``random``, ``ascending`` or ``descending``.
        always: Groups that train all the time.
        seed: Of the draws.
    """

    order: LayerOrder
    blocks: int
    every: int
    kind: str
    always: tuple[str, ...]
    seed: int

    def trainable(self, period: int) -> tuple[str, ...]:
        """Return the groups that train in period `period`."""
        blocks = self.order.blocks
        if self.kind == "random":
            # Ordering by a hash instead of a random stream: no library's shuffle is a contract.
            chosen = sorted(blocks, key=lambda name: self._hash(period, name))[: self.blocks]
        else:
            turn = blocks if self.kind == "ascending" else blocks[::-1]
            begin = period * self.blocks
            chosen = [turn[(begin + i) % len(turn)] for i in range(min(self.blocks, len(turn)))]
        return self.order.sorted([*chosen, *self.always])

    def _hash(self, period: int, name: str) -> bytes:
        return hashlib.blake2b(f"{self.seed}:{period}:{name}".encode(), digest_size=8).digest()


def frozen_prefix(order: Sequence[str], trainable: frozenset[str]) -> list[str]:
    """Return the layer groups, of those in `order` bottom to top, below the lowest that trains."""
    prefix: list[str] = []
    for name in order:
        if name in trainable:
            break
        prefix.append(name)
    return prefix


def phase_of(phases: Sequence[Phase], step: int) -> Phase:
    """Return the phase that step `step` belongs to."""
    return phases[bisect_right([p.start_step for p in phases], step) - 1]


def equal_steps(count: int, *, total_steps: int) -> list[int]:
    """Return the steps at which a run is cut into `count` equal parts."""
    return [round(i * total_steps / count) for i in range(1, count)]


def every_steps(interval: int, *, total_steps: int) -> list[int]:
    """Return the multiples of `interval` inside a run."""
    return list(range(interval, total_steps, max(1, interval)))
