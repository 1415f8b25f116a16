"""How a micro-batch goes through the trunk: without padding, from the frozen prefix's end on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from dist_ft import dist
from dist_ft.engine.base import MicroBatchLike
from dist_ft.engine.turns import Turn
from dist_ft.freezing.activation_cache import ActivationCache
from dist_ft.freezing.schedule import frozen_prefix
from dist_ft.model.flat_rows import FlatRows
from dist_ft.model.trunk import Trunk

# Part of every fingerprint: raise it when the same weights would give other hidden states.
_VERSION = 1


@dataclass
class TrunkPasses:
    """Makes the pass of each micro-batch, as the phase asks for it.

    Attributes:
        trunk: the model's trunk; None runs the model as transformers made it.
        cache: keeps what the frozen prefix returns; None computes it each time.
        order: backbone layer groups bottom to top.
        parameters: names of each layer group's parameters.
        schedule: what trains in each phase, in order, as far as it is known before the run. A row
            that goes through the prefix leaves behind what later phases will start from.
        boundary: the first block of the trunk that runs; 0 for the whole model.
    """

    trunk: Trunk | None = None
    cache: ActivationCache | None = None
    order: tuple[str, ...] = ()
    parameters: Mapping[str, Sequence[str]] = field(default_factory=dict)
    schedule: Sequence[frozenset[str]] = ()
    boundary: int = 0
    cached_bytes: int = 0
    _kept: tuple[int, ...] = ()

    def enter_phase(self, trainable: frozenset[str], *, weight: Callable[[str], Tensor]) -> None:
        """Find where the trunk begins in a phase, and open the cache for it.

        Args:
            trainable: layer groups that train.
            weight: returns a whole parameter by name; called on every rank in the same order.
        """
        if self.trunk is None or self.cache is None:
            return
        self.boundary = self._boundary_of(trainable)
        later = [self._boundary_of(t) for t in self._after(trainable)]
        kept = dict.fromkeys(b for b in (self.boundary, *later) if 0 < b <= self.boundary)
        self._kept = tuple(kept)
        prints = self._fingerprints(max(self._kept, default=0), weight=weight)
        self.cached_bytes = self.cache.open([(b, prints[b]) for b in self._kept])

    def _after(self, trainable: frozenset[str]) -> Sequence[frozenset[str]]:
        places = [i for i, t in enumerate(self.schedule) if t == trainable]
        return self.schedule[places[0] + 1 :] if places else ()

    def _boundary_of(self, trainable: frozenset[str]) -> int:
        assert self.trunk is not None
        prefix = set(frozen_prefix(self.order, trainable))
        names = self.trunk.group_names
        return next((i for i, name in enumerate(names) if name not in prefix), len(names))

    def _fingerprints(self, top: int, *, weight: Callable[[str], Tensor]) -> dict[int, str]:
        """Return, for each boundary up to `top`, a hash of all weights below it."""
        assert self.trunk is not None
        assert self.cache is not None
        names = self.trunk.group_names
        digest = xxhash.xxh3_64(f"{_VERSION} {self.cache.dtype} {self.trunk.flat}".encode())
        found: dict[int, str] = {}
        block = 0
        for group in self.order:
            if block == top:
                break
            for parameter in self.parameters[group]:
                value = weight(parameter).detach().cpu().contiguous()
                digest.update(value.view(torch.uint8).numpy().data)
            if group == names[block]:
                block += 1
                found[block] = digest.hexdigest()
        return found

    def of_turns(
        self, step: int, *, turns: Sequence[Turn], device: torch.device, in_step: bool
    ) -> list[TrunkPass | None]:
        """Return the pass of each micro-batch of a step's turns, in their order; see `of_step`."""
        return [
            way
            for turn in turns
            for way in self.of_step(
                step,
                task=turn.task,
                micro_batches=turn.micro_batches,
                device=device,
                in_step=in_step,
            )
        ]

    def of_step(
        self,
        step: int,
        *,
        task: str,
        micro_batches: Sequence[MicroBatchLike],
        device: torch.device,
        in_step: bool,
    ) -> list[TrunkPass | None]:
        """Return the pass of each of a step's micro-batches.

        Args:
            step: the optimizer step.
            task: its task.
            micro_batches: this rank's.
            device: where the model is.
            in_step: whether the ranks must run the same modules (partitioned weights): if one rank
                must compute a prefix, all do.
        """
        if self.trunk is None:
            return [None] * len(micro_batches)
        cache = self.cache if self.cache and task in self.cache.tasks() else None
        passes: list[TrunkPass | None] = []
        for batch in micro_batches:
            mask = batch.inputs.get("attention_mask")
            if mask is None:
                mask = torch.ones_like(batch.inputs["input_ids"])
            rows = FlatRows.of(mask, device=device)
            made = TrunkPass(self.trunk, rows=rows, task=task, step=step, batch=batch)
            if cache is not None and self.boundary:
                made.cache, made.boundary, made.kept = cache, self.boundary, self._kept
                made.computes = made.is_missing(verify=in_step)
            passes.append(made)
        if in_step and cache is not None and self.boundary:
            for made, computes in zip(
                passes, dist.all_reduce_max([int(p.computes) for p in passes if p]), strict=True
            ):
                assert made is not None
                made.computes = bool(computes)
        return passes

    def discard(self) -> None:
        """Delete what is cached: the run is over."""
        if self.cache is not None:
            self.cache.close()

    def none(self) -> None:
        """Let the next forward run as transformers made the model, for evaluation."""
        if self.trunk is not None:
            self.trunk.prepare(None)


@dataclass
class TrunkPass:
    """One micro-batch's way through the trunk.

    Attributes:
        trunk: the trunk.
        rows: the micro-batch's rows.
        task: its task.
        step: its optimizer step.
        batch: the micro-batch.
        cache: where hidden states of the frozen prefix are kept; None runs the whole model.
        boundary: the first block that runs.
        kept: boundaries whose hidden states are kept when the prefix is computed.
        computes: whether the prefix is run, for rows that are missing here or on another rank.
        found: rows that the cache had, once the pass has run.
    """

    trunk: Trunk
    rows: FlatRows
    task: str
    step: int
    batch: MicroBatchLike
    cache: ActivationCache | None = None
    boundary: int = 0
    kept: tuple[int, ...] = ()
    computes: bool = False
    found: int = 0

    def is_missing(self, *, verify: bool) -> bool:
        """Return whether this rank must compute the prefix for a row, if `verify`, for certain."""
        assert self.cache is not None
        return self.cache.missing(
            self.task, self.boundary, rows=self.batch.rows, step=self.step, verify=verify
        )

    @contextmanager
    def running(self, inputs: Mapping[str, Tensor]) -> Iterator[None]:
        """Let a forward of the model inside the context go this way."""
        if self.cache is None:
            self.trunk.prepare(self.rows)
            yield
            return
        hidden = self._hidden(inputs)
        self.trunk.prepare(self.rows)
        with self.trunk.starting_at(self.boundary, hidden):
            yield

    def _hidden(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return what enters the first block that runs, [tokens, hidden size]."""
        assert self.cache is not None
        there, found = self.cache.read(
            self.task, self.boundary, rows=self.batch.rows, step=self.step
        )
        self.found = int(there.sum())
        device = self.rows.places.device
        found = found.to(device, non_blocking=True)
        if not self.computes and there.all():
            return found
        missing = np.flatnonzero(~there)
        # A rank that misses nothing runs along with one row, and drops the result.
        chosen = torch.from_numpy(missing if len(missing) else np.zeros(1, dtype=np.int64))
        computed = self._compute(inputs, chosen=chosen, keep=bool(len(missing)))
        if not len(missing):
            return found
        if not there.any():
            return computed
        lengths = torch.tensor(self.rows.lengths)
        is_found = torch.from_numpy(there).repeat_interleave(lengths).to(device)
        hidden = computed.new_empty(self.rows.tokens, computed.shape[1])
        hidden[is_found] = found
        hidden[~is_found] = computed
        return hidden

    def _compute(self, inputs: Mapping[str, Tensor], *, chosen: Tensor, keep: bool) -> Tensor:
        count = self.rows.shape[0]
        places = chosen.to(self.rows.places.device)
        part = {n: v[places] for n, v in inputs.items() if v.dim() and v.shape[0] == count}
        mask = self.batch.inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(self.batch.inputs["input_ids"])
        rows = FlatRows.of(mask[chosen], device=places.device)
        with _eval(self.trunk.root):
            made = self.trunk.prefix(part, rows=rows, boundaries=self.kept)
        if keep and self.batch.distinct:
            assert self.cache is not None
            for boundary, hidden in made.items():
                self.cache.write(
                    self.task, boundary, rows=self.batch.rows[chosen.numpy()], hidden=hidden,
                    step=self.step,
                )  # fmt: skip
        return made[self.boundary]


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


def prefix_counts(ways: Sequence[TrunkPass | None]) -> dict[str, int]:
    """Return the rows of a step that start from a cached prefix, and how many were found."""
    cached = [way for way in ways if way is not None and way.cache is not None]
    return {
        "prefix_rows": sum(len(way.batch.rows) for way in cached),
        "prefix_found": sum(way.found for way in cached),
    }
