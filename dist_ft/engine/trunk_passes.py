"""Makes the way of each micro-batch through the trunk, as the phase asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from dist_ft import dist
from dist_ft.engine.base import nothing
from dist_ft.engine.cache_probe import CacheDecision, CacheProbe
from dist_ft.engine.trunk_pass import CachedPrefix, TrunkPass, flat_rows, token_mask
from dist_ft.engine.turns import MicroBatchLike, Turn
from dist_ft.freezing.activation_cache import ActivationCache
from dist_ft.freezing.row_store import FoundRows, RowKeys
from dist_ft.freezing.schedule import frozen_prefix
from dist_ft.model.trunk import Trunk

# Part of every fingerprint: raise it when the same weights would give other hidden states.
_VERSION = 4


def _keep_to_oneself(decision: CacheDecision) -> None:
    del decision


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
        probe: measures whether the cache pays; None keeps it in any case, or as was decided.
        decision: what the probe found, in this process or an earlier one of the run.
        tell: hears of the decision, on every rank.
        drop_prefix: whether an engine may take the weights of a prefix that is not run away.
        before_prefix: called before the prefix is run.
        boundary: the first block of the trunk that runs; 0 for the whole model.
    """

    trunk: Trunk | None = None
    cache: ActivationCache | None = None
    order: tuple[str, ...] = ()
    parameters: Mapping[str, Sequence[str]] = field(default_factory=dict)
    schedule: Sequence[frozenset[str]] = ()
    probe: CacheProbe | None = None
    decision: CacheDecision | None = None
    tell: Callable[[CacheDecision], None] = _keep_to_oneself
    drop_prefix: bool = False
    before_prefix: Callable[[], None] = nothing
    boundary: int = 0
    cached_bytes: int = 0
    _kept: tuple[int, ...] = ()
    _next_step: int = 0
    _ahead: dict[tuple[int, int], list[FoundRows | None]] = field(default_factory=dict)

    def enter_phase(self, trainable: frozenset[str], *, weight: Callable[[str], Tensor]) -> None:
        """Find where the trunk begins in a phase, and open the cache for it.

        Args:
            trainable: layer groups that train.
            weight: returns a whole parameter by name; called on every rank in the same order.
        """
        if self.trunk is None or self.cache is None:
            return
        boundary = self._boundary_of(trainable)
        self.boundary = boundary if self._pays(boundary) else 0
        later = [self._boundary_of(t) for t in self._after(trainable)]
        kept = dict.fromkeys(b for b in (self.boundary, *later) if 0 < b <= self.boundary)
        self._kept = tuple(b for b in kept if self._pays(b))
        prints = self._fingerprints(max(self._kept, default=0), weight=weight)
        self.cached_bytes = self.cache.open(
            [(b, prints[b]) for b in self._kept], step=self._next_step
        )

    def _pays(self, boundary: int) -> bool:
        return self.decision is None or self.decision.pays(boundary)

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

    def read_ahead(
        self, step: int, *, turn: int, task: str, micro_batches: Sequence[MicroBatchLike], pin: bool
    ) -> None:
        """Read what a later step will start from; any thread may call it before the step runs.

        What is written in between, or another phase, makes the step read again.

        Args:
            step: the optimizer step.
            turn: the place of the turn in the step.
            task: its task.
            micro_batches: this rank's.
            pin: read into page-locked memory.
        """
        cache, boundary = self.cache, self.boundary
        if cache is None or not boundary or task not in cache.tasks or not self._reads(step):
            return
        self._ahead[step, turn] = [
            cache.read_ahead(boundary, keys=_keys(task, batch), step=step, pin=pin)
            for batch in micro_batches
        ]

    def _reads(self, step: int) -> bool:
        """Return whether rows are read back in a step.

        While it is not known whether it pays, they are not; so a run that goes on after a kill
        does the same in each step, if it finds the decision or has to measure again.
        """
        if self.decision is not None:
            return step >= self.decision.step
        return self.probe is None

    def of_turns(
        self, step: int, *, turns: Sequence[Turn], device: torch.device, in_step: bool
    ) -> list[TrunkPass | None]:
        """Return the pass of each micro-batch of a step's turns, in their order; see `of_step`."""
        self._next_step = step + 1
        if any(self._starts_above(turn.task) for turn in turns):
            self._count_step(step)
        ways = [
            way
            for place, turn in enumerate(turns)
            for way in self.of_step(
                step,
                task=turn.task,
                micro_batches=turn.micro_batches,
                device=device,
                in_step=in_step,
                turn=place,
            )
        ]
        for old in [key for key in tuple(self._ahead) if key[0] <= step]:  # a thread adds to it
            del self._ahead[old]
        return ways

    def _starts_above(self, task: str) -> bool:
        """Return whether a task's rows start from the frozen prefix's end."""
        return self.cache is not None and bool(self.boundary) and task in self.cache.tasks

    def of_step(
        self,
        step: int,
        *,
        task: str,
        micro_batches: Sequence[MicroBatchLike],
        device: torch.device,
        in_step: bool,
        turn: int | None = None,
    ) -> list[TrunkPass | None]:
        """Return the pass of each of a turn's micro-batches.

        Args:
            step: the optimizer step.
            task: its task.
            micro_batches: this rank's.
            device: where the model is.
            in_step: whether the ranks must run the same modules (partitioned weights): if one rank
                must compute a prefix, all do.
            turn: the turn's place in the step, for what was read ahead; None if nothing was.
        """
        if self.trunk is None:
            return [None] * len(micro_batches)
        made = [
            TrunkPass(self.trunk, flat_rows(batch, device=device), step, batch)
            for batch in micro_batches
        ]
        if self._starts_above(task):
            early = None if turn is None else self._ahead.pop((step, turn), None)
            prefixes = self._prefixes(step, task=task, ways=made, early=early)
            for way, prefix in zip(made, prefixes, strict=True):
                way.prefix = prefix
            if in_step:
                _compute_together(prefixes)
        return [*made]

    def _count_step(self, step: int) -> None:
        """Decide whether the cache is used, once enough steps have been measured."""
        if self.probe is None or self.decision is not None:
            return
        assert self.cache is not None
        if self.probe.is_due:
            found = self.probe.decide(self.cache, boundary=self.boundary, step=step)
            if found is not None:
                self._decide(found)
                return
        self.probe.steps += 1

    def _decide(self, decision: CacheDecision) -> None:
        assert self.cache is not None
        self.decision, self.probe = decision, None
        if not decision.pays(self.boundary):
            self.boundary, self._kept = 0, ()
            self.cached_bytes = self.cache.open([])
        self.tell(decision)

    def _prefixes(
        self,
        step: int,
        *,
        task: str,
        ways: Sequence[TrunkPass],
        early: Sequence[FoundRows | None] | None,
    ) -> list[CachedPrefix]:
        assert self.cache is not None
        if early is None or len(early) != len(ways):  # planned anew since
            early = [None] * len(ways)
        made: list[CachedPrefix] = []
        for way, ahead in zip(ways, early, strict=True):
            prefix = CachedPrefix(
                self.cache,
                self.boundary,
                self._kept,
                _keys(task, way.batch, lengths=way.rows.lengths),
                probe=self.probe,
                before_compute=self.before_prefix,
            )
            if self._reads(step):
                prefix.read(step=step, early=ahead)
            made.append(prefix)
        return made

    def left_out(self) -> list[nn.Module]:
        """Return the modules that a step does not use if it finds all rows."""
        if self.trunk is None or not self.boundary:
            return []
        return self.trunk.left_out(self.boundary)

    def saved(self, step: int) -> None:
        """Hear that a checkpoint of a step is there."""
        if self.cache is not None:
            self.cache.saved_step = step

    def discard(self) -> None:
        """Delete what is cached: the run is over."""
        self._ahead.clear()
        if self.cache is not None:
            self.cache.close()

    def none(self) -> None:
        """Let the next forward run as transformers made the model, for evaluation."""
        self.before_prefix()
        if self.trunk is not None:
            self.trunk.prepare(None)


def _compute_together(prefixes: Sequence[CachedPrefix]) -> None:
    """Let every rank compute a micro-batch's prefix if one of them must."""
    wanted = dist.all_reduce_max([int(prefix.computes) for prefix in prefixes])
    for prefix, computes in zip(prefixes, wanted, strict=True):
        prefix.computes = bool(computes)


def _keys(task: str, batch: MicroBatchLike, *, lengths: Sequence[int] | None = None) -> RowKeys:
    """Return which rows a micro-batch has, in which version and of which length."""
    tokens = token_mask(batch).sum(1).numpy() if lengths is None else np.array(lengths)
    variants = np.zeros_like(batch.rows) if batch.variants is None else batch.variants
    return RowKeys(task, batch.rows, variants, tokens)
