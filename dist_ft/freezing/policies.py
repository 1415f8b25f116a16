"""Freezing policies: what trains in each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from dist_ft.freezing.schedule import BlockDraw, Phase, phase_of

Switch = Literal["rebuild", "in_place"]


class FreezePolicy(Protocol):
    """Decides what trains; called with the same arguments on every rank."""

    def phase_at(self, step: int) -> Phase:
        """Return the phase that step `step` belongs to."""
        ...

    def universe(self) -> frozenset[str]:
        """Return every layer group that may ever train."""
        ...

    def suits(self) -> Switch:
        """Return the kind of phase change that suits the length of the phases."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what was decided from measurements, as JSON; empty for a pure schedule."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what was decided before the run stopped."""
        ...


@dataclass(frozen=True)
class ScheduledPolicy:
    """Phases that are all known before the run."""

    phases: Sequence[Phase]

    def phase_at(self, step: int) -> Phase:
        """Return the phase that step `step` belongs to."""
        return phase_of(self.phases, step)

    def universe(self) -> frozenset[str]:
        """Return every layer group that some phase trains."""
        return frozenset(name for phase in self.phases for name in phase.trainable)

    def suits(self) -> Switch:
        """Return ``rebuild``: listed phases are long enough that memory should follow them."""
        return "rebuild"

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the schedule follows from the recipe."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over nothing."""


@dataclass(frozen=True)
class BlockPolicy:
    """A few blocks at a time, drawn or in turn."""

    draw: BlockDraw

    def phase_at(self, step: int) -> Phase:
        """Return the phase of the period that step `step` belongs to."""
        period = step // self.draw.every
        return Phase(period, period * self.draw.every, self.draw.trainable(period))

    def universe(self) -> frozenset[str]:
        """Return the blocks and what always trains."""
        return frozenset((*self.draw.order.blocks, *self.draw.always))

    def suits(self) -> Switch:
        """Return ``in_place``: the mask changes often."""
        return "in_place"

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the draws follow from the seed and the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over nothing."""
