"""How a micro-batch goes through the trunk: without padding, from the frozen prefix's end on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dist_ft.engine.base import PrefixCounts, nothing
from dist_ft.engine.cache_probe import CacheProbe
from dist_ft.engine.turns import MicroBatchLike
from dist_ft.freezing.activation_cache import ActivationCache
from dist_ft.freezing.row_store import FoundRows, RowKeys
from dist_ft.model.flat_rows import FlatRows
from dist_ft.model.trunk import Trunk


@dataclass
class CachedPrefix:
    """What a micro-batch's pass needs to begin above the frozen prefix.

    Attributes:
        cache: where hidden states of the frozen prefix are kept.
        boundary: the first block that runs.
        kept: boundaries whose hidden states are kept when the prefix is computed.
        keys: the micro-batch's rows.
        found: what the cache had of them; None leaves everything to be computed.
        computes: whether the prefix is run, for rows that are missing here or on another rank.
        wait_s: how long the step waited for the disk, seconds.
        probe: what counts the cost, while it is measured.
        before_compute: called before the prefix is run.
    """

    cache: ActivationCache
    boundary: int
    kept: tuple[int, ...]
    keys: RowKeys
    found: FoundRows | None = None
    computes: bool = True
    wait_s: float = 0.0
    probe: CacheProbe | None = None
    before_compute: Callable[[], None] = nothing

    def read(self, *, step: int, early: FoundRows | None) -> None:
        """Read what is there for a step, unless it has been read ahead."""
        began = time.perf_counter()
        self.found = self.cache.read(self.boundary, keys=self.keys, step=step, early=early)
        self.computes = not self.found.there.all()
        self.wait_s = time.perf_counter() - began

    @property
    def rows_found(self) -> int:
        """Rows whose hidden states the cache had."""
        return 0 if self.found is None else int(self.found.there.sum())


@dataclass
class TrunkPass:
    """One micro-batch's way through the trunk.

    Attributes:
        trunk: the trunk.
        rows: the micro-batch's rows.
        step: its optimizer step.
        batch: the micro-batch.
        prefix: what is kept of the frozen prefix; None runs the whole model.
    """

    trunk: Trunk
    rows: FlatRows
    step: int
    batch: MicroBatchLike
    prefix: CachedPrefix | None = None

    @contextmanager
    def running(self, inputs: Mapping[str, Tensor], *, task: str) -> Iterator[None]:
        """Let a forward of a task's model inside the context go this way."""
        if self.prefix is None:
            self.trunk.prepare(self.rows, task=task)
            yield
            return
        hidden = self._hidden(self.prefix, inputs)
        self.trunk.prepare(self.rows, task=task)
        with self.trunk.starting_at(self.prefix.boundary, hidden):
            yield

    def _hidden(self, prefix: CachedPrefix, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return what enters the first block that runs, [tokens, hidden size]."""
        count = self.rows.shape[0]
        device = self.rows.places.device
        found = prefix.found
        there = np.zeros(count, dtype=np.bool_) if found is None else found.there
        if found is not None and not prefix.computes:
            return found.hidden.to(device, non_blocking=True)
        missing = np.flatnonzero(~there)
        # A rank that misses nothing runs along with one row, and drops the result.
        chosen = missing if len(missing) else np.zeros(1, dtype=np.int64)
        computed = self._compute(prefix, inputs, chosen=chosen, keep=bool(len(missing)))
        if found is None or not there.any():
            return computed
        read = found.hidden.to(device, non_blocking=True)
        if not len(missing):
            return read
        is_found = torch.from_numpy(np.repeat(there, prefix.keys.lengths)).to(device)
        hidden = computed.new_empty(self.rows.tokens, computed.shape[1])
        hidden[is_found] = read
        hidden[~is_found] = computed
        return hidden

    def _compute(
        self,
        prefix: CachedPrefix,
        inputs: Mapping[str, Tensor],
        *,
        chosen: np.ndarray,
        keep: bool,
    ) -> Tensor:
        count = self.rows.shape[0]
        places = torch.from_numpy(chosen).to(self.rows.places.device)
        part = {n: v[places] for n, v in inputs.items() if v.dim() and v.shape[0] == count}
        rows = self.rows if len(chosen) == count else flat_rows(self.batch, device=places.device,
                                                                chosen=chosen)  # fmt: skip
        clock = CacheProbe.clock if prefix.probe else time.perf_counter
        prefix.before_compute()
        began = clock()
        with _eval(self.trunk.root):
            made = self.trunk.prefix(part, rows=rows, boundaries=prefix.kept)
        computed = clock()
        if keep and self.batch.distinct:
            keys = prefix.keys.select(chosen)
            for boundary, hidden in made.items():
                prefix.cache.write(boundary, keys=keys, hidden=hidden, step=self.step)
            if prefix.probe is not None:
                prefix.probe.add(
                    keys,
                    compute_s=computed - began,
                    write_s=clock() - computed,
                    boundaries=len(made),
                )
        return made[prefix.boundary]


def flat_rows(
    batch: MicroBatchLike, *, device: torch.device, chosen: np.ndarray | None = None
) -> FlatRows:
    """Return where the tokens of a micro-batch, or of some of its rows, are."""
    mask = token_mask(batch)
    return FlatRows.of(mask if chosen is None else mask[torch.from_numpy(chosen)], device=device)


def token_mask(batch: MicroBatchLike) -> Tensor:
    """Return 1 on a micro-batch's tokens and 0 on its padding, int64 [rows, length]."""
    mask = batch.inputs.get("attention_mask")
    return torch.ones_like(batch.inputs["input_ids"]) if mask is None else mask


@contextmanager
def _eval(module: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the context."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def needs_prefix(ways: Sequence[TrunkPass | None]) -> bool:
    """Return whether this rank runs the frozen prefix in a step."""
    return any(way is None or way.prefix is None or way.prefix.computes for way in ways)


def prefix_counts(ways: Sequence[TrunkPass | None], *, parked_bytes: int = 0) -> PrefixCounts:
    """Return what a step found of the frozen prefix in the cache."""
    cached = [way.prefix for way in ways if way is not None and way.prefix is not None]
    return PrefixCounts(
        rows=sum(len(prefix.keys.rows) for prefix in cached),
        found=sum(prefix.rows_found for prefix in cached),
        wait_s=sum(prefix.wait_s for prefix in cached),
        parked_bytes=parked_bytes,
    )
