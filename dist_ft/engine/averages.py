"""The average of the weights, cut over the ranks like the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dist_ft.dist import sum_over_ranks
from dist_ft.engine.base import EngineState, StateSource
from dist_ft.engine.ds_groups import Partitioning
from dist_ft.engine.ds_state import Owner, OwnerLayout, share_of_owner
from dist_ft.optim.averaging import Averaging

# Name of the values in a checkpoint.
AVERAGE = "average"


@dataclass
class WeightAverage:
    """fp32 averages of the parameter groups that have trained, this rank's share of each.

    A group's average moves while the group trains. Frozen, its weights stay and so does its
    average; a group that never trained has none, its weights are their own.

    Attributes:
        options: Which weights count; None keeps no averages.
        sizes: Name and number of elements of each group's parameters, by group.
        partitioning: How ZeRO lays them out.
        counts: How many sets of weights are in each group's average.
    """

    options: Averaging | None
    sizes: Mapping[str, Sequence[tuple[str, int]]]
    partitioning: Partitioning
    counts: dict[str, int] = field(default_factory=dict)
    _values: dict[str, list[Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def update(self, done: int, *, masters: Mapping[str, Sequence[Tensor]]) -> None:
        """Take the weights after `done` steps into the averages of the groups that train.

        Args:
            done: Optimizer steps done.
            masters: This rank's fp32 weights of each parameter group that trains.
        """
        if self.options is None or not self.options.counts(done):
            return
        for name, tensors in masters.items():
            before = self.counts.get(name, 0)
            share = self.options.newest(before)
            self.counts[name] = before + 1
            if before == 0:
                self._values[name] = [t.detach().float().flatten().clone() for t in tensors]
                continue
            pairs = zip(self._values[name], tensors, strict=True)
            self._values[name] = [
                value.to(tensor.device).lerp_(tensor.detach().float().flatten(), share)
                for value, tensor in pairs
            ]

    def park(self, trainable: frozenset[str]) -> None:
        """Keep the averages of other layer groups than these in host memory."""
        for name, values in self._values.items():
            # A parameter group is named after its layer group.
            if name.rpartition("/")[0] not in trainable:
                self._values[name] = [value.to("cpu") for value in values]

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each averaged parameter, flat fp32; every rank must go through all of them."""
        for name, values in self._values.items():
            totals = {
                parameter: torch.zeros(numel, device=values[0].device)
                for parameter, numel in self.sizes[name]
            }
            for owner in self._owners(name):
                for piece in owner.layout.pieces:
                    part = owner.moments[AVERAGE][piece.offset : piece.offset + piece.length]
                    totals[piece.parameter][piece.start : piece.start + piece.length] = part
            for parameter, total in totals.items():
                if self.partitioning.zero_stage != 0:
                    sum_over_ranks(total)  # every element is on one rank
                yield parameter, total

    def _owners(self, name: str) -> list[Owner]:
        values = self._values[name]
        layouts = self.partitioning.layouts(self.sizes[name])
        return [Owner(at, None, {AVERAGE: v}) for at, v in zip(layouts, values, strict=True)]

    def add_to(self, state: EngineState) -> EngineState:
        """Return an engine's state with this rank's share of the averages, as views."""
        owners = [owner for name in self._values for owner in self._owners(name)]
        share = self.partitioning.share
        for owner in owners:
            state.slices += share_of_owner(owner, with_master=False, share=share)
        state.averaged = dict(self.counts)
        return state

    @torch.no_grad()
    def load(self, source: StateSource) -> None:
        """Take over saved averages.

        Raises:
            ValueError: If the checkpoint says that there are some, and lacks them.
        """
        if self.options is None:
            return
        self.counts, self._values = dict(source.averaged), {}
        for name in self.counts:
            self._values[name] = [
                _read(layout, source=source)
                for layout in self.partitioning.layouts(self.sizes[name])
            ]


def _read(layout: OwnerLayout, *, source: StateSource) -> Tensor:
    value = torch.zeros(layout.numel)
    for piece in layout.pieces:
        part = source.read(AVERAGE, piece.parameter, start=piece.start, length=piece.length)
        if part is None:
            raise ValueError(
                f"the checkpoint has no average of {piece.parameter}: it is damaged; resume from "
                "an earlier one"
            )
        value[piece.offset : piece.offset + piece.length] = part
    return value
