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
    """A few blocks at a time, drawn or in turn, in a run of `total_steps`."""

    draw: BlockDraw
    total_steps: int

    def phase_at(self, step: int) -> Phase:
        """Return the phase of the period that step `step` belongs to."""
        period = step // self.draw.every
        return Phase(period, period * self.draw.every, self.draw.trainable(period))

    def universe(self) -> frozenset[str]:
        """Return what always trains and the blocks whose turn comes within the run."""
        groups = set(self.draw.always)
        for start in range(0, self.total_steps, self.draw.every):
            groups.update(self.phase_at(start).trainable)
            if groups.issuperset(self.draw.order.blocks):
                break
        return frozenset(groups)

    def suits(self) -> Switch:
        """Return ``in_place``: the mask changes often."""
        return "in_place"

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the draws follow from the seed and the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over nothing."""
