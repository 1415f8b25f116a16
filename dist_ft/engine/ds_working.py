"""The weights that a DeepSpeed engine computes with, not those that its optimizer updates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from dist_ft.engine.anchors import Anchors
from dist_ft.engine.averages import WeightAverage
from dist_ft.engine.ds_groups import GroupStates
from dist_ft.engine.ds_weights import WeightAccess
from dist_ft.engine.exchange import gather
from dist_ft.engine.mixing import MixedGroup, Mixing
from dist_ft.optim.param_groups import ParamGroup


@dataclass(frozen=True)
class WorkingWeights:
    """This rank's share of the weights that forwards use, cut like the optimizer's own tensors.

    The attribute names are DeepSpeed's own and not part of its interface; the distributed tests
    compare what comes of them with plain torch, so a change of meaning fails there.

    Attributes:
        engine: The DeepSpeed engine.
        zero_stage: Its stage.
    """

    engine: Any
    zero_stage: int

    def shares(self, index: int) -> list[Tensor]:
        """Return the flat tensors of held parameter group `index`, to be read and written."""
        optimizer = self.engine.optimizer
        if self.zero_stage == 3:
            return [optimizer.fp16_partitioned_groups_flat[index]]
        if self.zero_stage in (1, 2):
            rank = dist.get_rank(group=optimizer.real_dp_process_group[index])
            return [optimizer.parallel_partitioned_bit16_groups[index][rank]]
        groups = getattr(optimizer, "fp16_groups", None)
        if groups is None:
            groups = [g["params"] for g in optimizer.param_groups]
        return [parameter.data.view(-1) for parameter in groups[index]]

    def hide(self) -> None:
        """Free what forwards have gathered and would not gather again; the shares are all."""
        if self.zero_stage == 3:
            self.engine.optimizer._partition_all_parameters()

    def publish(self, indices: Sequence[int]) -> None:
        """Let the forwards of all ranks see what is in the shares of these groups."""
        optimizer = self.engine.optimizer
        if self.zero_stage == 3:
            persistent = optimizer.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)
        elif self.zero_stage in (1, 2):
            pending = [
                gather([optimizer.bit16_groups_flat[i]], group=optimizer.real_dp_process_group[i])
                for i in indices
            ]
            for finish in pending:
                finish()


def begin_mixing(
    mixing: Mixing,
    step: int,
    *,
    groups: Mapping[int, ParamGroup],
    working: WorkingWeights,
    states: GroupStates,
    anchors: Anchors,
    parameters: Mapping[str, nn.Parameter],
) -> None:
    """Mix the weights that forwards use with the start, on all ranks.

    Args:
        mixing: Mixes, and gives the true weights back.
        step: The optimizer step.
        groups: The held parameter groups that are mixed, by their index.
        working: The weights.
        states: Says which part of them is this rank's.
        anchors: The start.
        parameters: By name.
    """
    working.hide()
    mixed = [
        MixedGroup(
            group,
            working.shares(index),
            anchors[group.name],
            states.partitioning.layouts(states.sizes[group.name]),
        )
        for index, group in groups.items()
    ]
    mixing.begin(step, groups=mixed, parameters=parameters)
    working.publish(list(groups))


@contextmanager
def replaced(
    average: WeightAverage, *, working: WorkingWeights, weights: WeightAccess
) -> Iterator[None]:
    """Let forwards inside the context use the average of the weights, where there is one.

    Args:
        average: The same groups on every rank.
        working: The weights that forwards use.
        weights: Writes them.
    """
    if not average.counts:
        yield
        return
    working.hide()
    kept = weights.copies()
    for name, value in average.whole():
        weights.write(name, value)
    working.publish([])
    try:
        yield
    finally:
        working.hide()
        for tensor, value in kept:
            tensor.copy_(value)
        working.publish([])
