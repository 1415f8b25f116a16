"""Policies that decide from measurements: unfreeze or freeze as training shows it is time.

The measurements are the same on every rank; rank 0's decision is the one that is applied (see
``train.adapt``). What was decided is part of the checkpoint.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dist_ft.freezing.policies import Switch
from dist_ft.freezing.schedule import LayerOrder, Phase


@dataclass
class Decisions:
    """What a measuring policy has decided so far, as JSON-able numbers.

    Attributes:
        phase: Index of the current phase.
        start_step: First step of the current phase.
        depth: Blocks that are frozen from the bottom.
        best: Best score so far, larger is better.
        stalled: Evaluations without an improvement.
        previous: Last measurement of each layer group.
        grams: Flattened Gram matrices of the last representations, where those are compared.
    """

    depth: int
    phase: int = 0
    start_step: int = 0
    best: float | None = None
    stalled: int = 0
    previous: dict[str, float] = field(default_factory=dict)
    grams: dict[str, list[float]] = field(default_factory=dict)


class MeasuredPolicy:
    """A policy whose depth moves by decisions; what is common to all of them."""

    def __init__(self, order: LayerOrder, *, depth: int) -> None:
        """Start with the bottom `depth` blocks frozen."""
        self.order = order
        self.decisions = Decisions(depth=depth)

    def phase_at(self, step: int) -> Phase:  # noqa: ARG002 - the protocol's signature
        """Return the current phase: decisions hold until the next one."""
        now = self.decisions
        return Phase(now.phase, now.start_step, self.order.above(now.depth))

    def universe(self) -> frozenset[str]:
        """Return everything: any block may come to train."""
        return frozenset(self.order.everything)

    def suits(self) -> Switch:
        """Return ``rebuild``: decisions are seldom, so memory should follow them."""
        return "rebuild"

    def state_dict(self) -> dict[str, Any]:
        """Return the decisions as JSON."""
        return asdict(self.decisions)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over decisions: rank 0's, or those of a checkpoint."""
        self.decisions = Decisions(**state)

    def move_to(self, depth: int, *, step: int) -> None:
        """Begin a phase with the bottom `depth` blocks frozen, if that changes anything."""
        depth = max(0, min(depth, len(self.order.blocks)))
        if depth != self.decisions.depth:
            self.decisions.depth = depth
            self.decisions.phase += 1
            self.decisions.start_step = step


class PlateauPolicy(MeasuredPolicy):
    """Unfreezes (or freezes) blocks when the validation score has stopped improving.

    The timing of finetuning-scheduler's early-stopping phases, without their restart from the best
    checkpoint.
    """

    def __init__(
        self,
        order: LayerOrder,
        *,
        direction: Literal["unfreeze", "freeze"],
        first: int,
        groups_per_phase: int,
        patience: int,
        min_delta: float,
    ) -> None:
        """Start from the top `first` blocks (to unfreeze) or from everything (to freeze)."""
        start = len(order.blocks) - first if direction == "unfreeze" else 0
        super().__init__(order, depth=max(0, start))
        self._change = -groups_per_phase if direction == "unfreeze" else groups_per_phase
        self._patience = patience
        self._min_delta = min_delta

    def observe_score(self, step: int, score: float) -> None:
        """Take a validation score (larger is better) at `step` and decide.

        NaN is the worst of all: it is no improvement, and any number is one on it.
        """
        now = self.decisions
        score = -math.inf if math.isnan(score) else score
        if now.best is None or score > now.best + self._min_delta:
            now.best, now.stalled = score, 0
            return
        now.stalled += 1
        if now.stalled >= self._patience:
            now.stalled = 0
            self.move_to(now.depth + self._change, step=step)


class SettledPolicy(MeasuredPolicy):
    """Freezes the bottom blocks whose measurement has settled.

    AutoFreeze (Liu et al. 2021, section 3.2): at every interval each trainable block has a rate of
    change ``|before - now| / before`` of its gradient norm; the longest run of blocks from the
    bottom whose rates are at most the given percentile of all rates is frozen. With
    representations instead of gradients (Egeria, Wang et al. 2023) the measurement is a rate
    already.
    """

    def __init__(
        self, order: LayerOrder, *, percentile: float, max_depth: int | None, is_rate: bool
    ) -> None:
        """Start with everything trainable.

        Args:
            order: The layer groups.
            percentile: Of the rates, between 0 and 100; larger freezes sooner.
            max_depth: Blocks that may be frozen; by default all but the topmost.
            is_rate: The measurements are rates of change themselves.
        """
        super().__init__(order, depth=0)
        self._percentile = percentile
        self._max_depth = len(order.blocks) - 1 if max_depth is None else max_depth
        self._is_rate = is_rate

    def observe(self, step: int, measured: Mapping[str, float]) -> None:
        """Take a measurement of each trainable block at `step` and decide."""
        active = self.order.blocks[self.decisions.depth :]
        rates = self._rates(measured)
        self.decisions.previous = dict(measured)
        known = [rates[name] for name in active if name in rates]
        if len(known) < 2 or len(known) < len(active):
            return
        limit = _percentile(known, self._percentile)
        settled = 0
        for name in active:
            if rates[name] > limit:
                break
            settled += 1
        self.move_to(min(self._max_depth, self.decisions.depth + settled), step=step)

    def _rates(self, measured: Mapping[str, float]) -> dict[str, float]:
        if self._is_rate:
            return dict(measured)
        before = self.decisions.previous
        return {
            name: abs(before[name] - value) / before[name]
            for name, value in measured.items()
            if before.get(name, 0.0) > 0.0
        }


def _percentile(values: list[float], percentile: float) -> float:
    cuts = statistics.quantiles(sorted(values), n=100, method="inclusive")
    return cuts[min(98, max(0, round(percentile) - 1))]
