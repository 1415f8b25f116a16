"""Measures whether keeping what a frozen prefix returns is quicker than computing it each time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import psutil
import torch

from dist_ft import dist
from dist_ft.freezing.activation_cache import ActivationCache
from dist_ft.freezing.row_store import RowKeys

# Steps that are measured, after one that is not: it allocates.
_STEPS = 4
# A file larger than this share of the free memory will not stay there until it is read again.
_IN_MEMORY = 0.5


@dataclass(frozen=True)
class CacheDecision:
    """What a token costs on this run's machines, and what follows.

    All of it is a mean over all ranks, and the same on each.

    Attributes:
        step: the step from which on the decision holds; before it, nothing is read back.
        boundary: blocks of the prefix that was measured.
        visits: how often a row comes while some prefix is frozen.
        compute_s: seconds to compute a token's hidden state at the boundary.
        write_s: seconds to write it.
        read_s: seconds to read it; None if no row was kept.
        from_disk: whether it was read from the disk, as it will be, and not from memory.
    """

    step: int
    boundary: int
    visits: float
    compute_s: float
    write_s: float
    read_s: float | None
    from_disk: bool

    def pays(self, boundary: int) -> bool:
        """Return whether keeping the hidden states at a boundary saves time; blocks cost alike."""
        if self.read_s is None or boundary == 0:
            return False
        compute = self.compute_s * boundary / self.boundary
        # Written once, read every other time.
        return compute > self.read_s + self.write_s / max(self.visits - 1, 1e-9)


@dataclass
class CacheProbe:
    """Times the first steps whose rows go through a frozen prefix.

    Attributes:
        visits: how often a row comes while some prefix is frozen.
        steps: such steps so far, the same on every rank.
    """

    visits: float
    steps: int = 0
    _compute_s: float = 0.0
    _write_s: float = 0.0
    _tokens: int = 0
    _written: int = 0
    _keys: list[RowKeys] = field(default_factory=list)

    @property
    def is_due(self) -> bool:
        """Whether enough has been seen to decide."""
        return self.steps > _STEPS

    @staticmethod
    def clock() -> float:
        """Return the time when all work that was given to the device is done, seconds."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def add(self, keys: RowKeys, *, compute_s: float, write_s: float, boundaries: int) -> None:
        """Count rows that were computed, and written at some boundaries."""
        if self.steps <= 1:
            return
        tokens = int(keys.lengths.sum())
        self._compute_s += compute_s
        self._tokens += tokens
        self._write_s += write_s
        self._written += tokens * boundaries
        self._keys.append(keys)

    def decide(self, cache: ActivationCache, *, boundary: int, step: int) -> CacheDecision | None:
        """Return the decision from all ranks' figures; None if there was nothing to measure.

        Args:
            cache: where the rows were written.
            boundary: the boundary that is read.
            step: the step that comes.
        """
        free = psutil.virtual_memory().available
        (from_disk,) = dist.all_reduce_max([int(cache.nbytes() > _IN_MEMORY * free)])
        if from_disk:
            cache.drop_from_memory()
        began = time.perf_counter()
        found = [cache.read_ahead(boundary, keys=keys, step=step) for keys in self._keys]
        read_s = time.perf_counter() - began
        read = sum(len(f.hidden) for f in found if f is not None)
        compute_s, tokens, write_s, written, read_s, read = dist.all_reduce_sum(
            [self._compute_s, self._tokens, self._write_s, self._written, read_s, read]
        )
        self.steps, self._keys = 0, []
        if not tokens:
            return None
        return CacheDecision(
            step=step,
            boundary=boundary,
            visits=self.visits,
            compute_s=compute_s / tokens,
            write_s=write_s / max(1, written),
            read_s=read_s / read if read else None,
            from_disk=bool(from_disk),
        )
