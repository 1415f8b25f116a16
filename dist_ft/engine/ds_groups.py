"""Where the optimizer state of every parameter group is: in the DeepSpeed engine, or parked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dist_ft.engine.anchors import Anchors
from dist_ft.engine.base import Precision, StateSlice, StateSource
from dist_ft.engine.ds_state import (
    Owner,
    OwnerLayout,
    capture,
    engine_masters,
    group_steps,
    install,
    owner_layouts,
    read_owner,
    share_of_owner,
)
from dist_ft.optim.adamw import GroupAdamW
from dist_ft.optim.param_groups import ParamGroup


@dataclass(frozen=True)
class Partitioning:
    """How ZeRO lays out a group's state, and which part of it is this rank's."""

    zero_stage: int
    precision: Precision
    rank: int
    world_size: int

    @property
    def has_masters(self) -> bool:
        """Whether there are fp32 values besides the weights."""
        return self.precision != "fp32"

    @property
    def share(self) -> tuple[int, int] | None:
        """(rank, world size) where every rank holds all and writes a part; None elsewhere."""
        return (self.rank, self.world_size) if self.zero_stage == 0 else None

    def layouts(self, sizes: Sequence[tuple[str, int]]) -> list[OwnerLayout]:
        """Return what this rank holds of a parameter group of these parameters."""
        return owner_layouts(
            sizes, zero_stage=self.zero_stage, rank=self.rank, world_size=self.world_size
        )


@dataclass(frozen=True)
class Attached:
    """A DeepSpeed engine, its optimizer, and the parameter groups that it holds, in its order."""

    engine: Any
    inner: GroupAdamW
    held: tuple[ParamGroup, ...]
    partitioning: Partitioning

    def masters(self, index: int) -> list[Tensor]:
        """Return the tensors that the optimizer updates for the held group `index`."""
        return engine_masters(
            self.engine,
            zero_stage=self.partitioning.zero_stage,
            precision=self.partitioning.precision,
            index=index,
        )

    def steps(self, index: int) -> int:
        """Return how many updates the held group `index` has had."""
        return group_steps(self.masters(index), inner=self.inner)


@dataclass
class GroupStates:
    """Masters, moments and step counts of all parameter groups, across phases.

    Attributes:
        sizes: Name and number of elements of each group's parameters, by group.
        partitioning: How ZeRO lays them out.
    """

    sizes: Mapping[str, Sequence[tuple[str, int]]]
    partitioning: Partitioning
    _attached: Attached | None = None
    # Of groups that the engine does not hold, or that it holds while they do not train.
    _parked: dict[str, list[Owner]] = field(default_factory=dict)
    _steps: dict[str, int] = field(default_factory=dict)

    @property
    def held(self) -> tuple[ParamGroup, ...]:
        """The parameter groups that the engine holds, in its order."""
        return self._attached.held if self._attached else ()

    def attach(self, engine: Any, *, inner: GroupAdamW, held: Sequence[ParamGroup]) -> None:
        """Take over a fresh engine and give it what is parked of the groups that it holds."""
        self._attached = Attached(engine, inner, tuple(held), self.partitioning)
        for index in range(len(held)):
            self._install(index)

    def detach(self) -> None:
        """Park the state of the engine's groups and let go of the engine."""
        for index, group in enumerate(self.held):
            if group.name not in self._parked:
                self._steps[group.name] = self._engine.steps(index)
            self._parked[group.name] = self._whole(index)
        self._attached = None

    def clear(self) -> None:
        """Forget all state."""
        self._attached = None
        self._parked.clear()
        self._steps.clear()

    @property
    def _engine(self) -> Attached:
        assert self._attached is not None, "set_trainable comes first"
        return self._attached

    def forget_moments(self, layer_groups: frozenset[str]) -> None:
        """Begin with these layer groups as if they had never been updated."""
        for index, group in enumerate(self.held):
            if group.layer_group not in layer_groups:
                continue
            self._steps[group.name] = 0
            for owner in self._parked.get(group.name, []):
                owner.moments = {}
            for master in self._engine.masters(index):
                self._engine.inner.state.pop(master, None)

    def settle(self, trainable: frozenset[str]) -> None:
        """Move the state of groups that do not train to the host, and back for those that do.

        The moments of groups that train are made at once, so that their memory is seen.
        """
        attached = self._engine
        held = {g.name for g in attached.held}
        for name, owners in self._parked.items():
            if name not in held:
                for owner in owners:
                    owner.park(with_master=self.partitioning.has_masters)
        for index, group in enumerate(attached.held):
            if group.layer_group not in trainable:
                self._park(index)
                continue
            self._install(index)
            for master in attached.masters(index):
                attached.inner.ensure_state(master)

    def _park(self, index: int) -> None:
        attached = self._engine
        name = attached.held[index].name
        if name in self._parked:
            return
        self._steps[name] = attached.steps(index)
        self._parked[name] = self._capture(index)
        for master in attached.masters(index):
            attached.inner.state.pop(master, None)
        for owner in self._parked[name]:
            # The engine keeps the masters of all its groups; only moments can leave it.
            owner.park(with_master=False)

    def _install(self, index: int) -> None:
        attached = self._engine
        name = attached.held[index].name
        parked = self._parked.pop(name, None)
        if parked is not None:
            install(
                parked,
                masters=attached.masters(index),
                inner=attached.inner,
                steps=self._steps.get(name, 0),
            )

    def layouts(self, name: str) -> list[OwnerLayout]:
        """Return what each tensor holds that the optimizer updates for the group `name`."""
        return self.partitioning.layouts(self.sizes[name])

    def masters_of(self, layer_groups: frozenset[str]) -> dict[str, list[Tensor]]:
        """Return the tensors that the optimizer updates for these layer groups, by group."""
        return {
            g.name: self._engine.masters(i)
            for i, g in enumerate(self.held)
            if g.layer_group in layer_groups
        }

    def _capture(self, index: int) -> list[Owner]:
        attached = self._engine
        layouts = self.layouts(attached.held[index].name)
        return capture(attached.masters(index), layouts=layouts, inner=attached.inner)

    def _whole(self, index: int) -> list[Owner]:
        """Return a held group's masters with its moments, parked or not."""
        owners = self._capture(index)
        parked = self._parked.get(self._engine.held[index].name, owners)
        for owner, other in zip(owners, parked, strict=True):
            owner.moments = other.moments
        return owners

    def parked_bytes(self) -> int:
        """Return the bytes of this rank's parked masters and moments."""
        return sum(o.nbytes() for owners in self._parked.values() for o in owners)

    def optimizer_bytes(self) -> int:
        """Return the bytes of this rank's masters and moments in the engine."""
        owners = [o for i in range(len(self.held)) for o in self._capture(i)]
        if self.partitioning.zero_stage == 0 and not self.partitioning.has_masters:
            return sum(o.moment_bytes() for o in owners)  # the weights are their own masters
        return sum(o.nbytes() for o in owners)

    def moment_squares(self, layer_groups: frozenset[str]) -> dict[str, float]:
        """Return the sum of squares of this rank's first moments by layer group."""
        active = [(i, g) for i, g in enumerate(self.held) if g.layer_group in layer_groups]
        squares = dict.fromkeys((g.layer_group for _, g in active), 0.0)
        for index, group in active:
            squares[group.layer_group] += sum(o.moment_square() for o in self._capture(index))
        return squares

    def export(self) -> tuple[list[StateSlice], dict[str, int]]:
        """Return this rank's share of masters and moments, as views, and the step counts."""
        steps, groups = dict(self._steps), dict(self._parked)
        for index, group in enumerate(self.held):
            if group.name not in self._parked:
                steps[group.name] = self._engine.steps(index)
            groups[group.name] = self._whole(index)
        where = self.partitioning
        slices: list[StateSlice] = []
        for owners in groups.values():
            for owner in owners:
                slices += share_of_owner(owner, with_master=where.has_masters, share=where.share)
        return slices, steps

    def load(self, source: StateSource) -> None:
        """Take over saved masters, moments and step counts; `settle` comes next."""
        self._steps = dict(source.steps)
        self._parked.clear()
        index_of = {g.name: i for i, g in enumerate(self.held)}
        for name in self.sizes:
            steps = self._steps.get(name, 0)
            # A group that was reset and then parked has no steps, but its weights are no masters.
            if name not in index_of and steps == 0 and not self._has_masters(name, source):
                continue
            self._parked[name] = [
                read_owner(layout, source=source, stepped=steps > 0)
                for layout in self.layouts(name)
            ]
            if name in index_of:
                self._install(index_of[name])

    def _has_masters(self, name: str, source: StateSource) -> bool:
        if not self.partitioning.has_masters:
            return False
        first, _ = self.sizes[name][0]
        return source.read("master", first, start=0, length=1) is not None


def optimizer_group(
    group: ParamGroup,
    *,
    parameters: Mapping[str, nn.Parameter],
    anchors: Anchors,
    held: Sequence[Sequence[tuple[int, int]]],
) -> dict[str, Any]:
    """Return a parameter group as `GroupAdamW` takes it, before DeepSpeed cuts it.

    Args:
        group: The group.
        parameters: By name.
        anchors: The starting weights by group, where something pulls towards them.
        held: Runs of elements that never move, in each tensor that is updated.
    """
    return {
        "params": [parameters[n] for n in group.parameters],
        "lr": group.lr,
        "weight_decay": group.weight_decay,
        "penalty": group.penalty,
        "anchors": anchors.get(group.name, []),
        "held": held,
        # Some of DeepSpeed's wrappers run a step without gradients when built.
        "active": False,
    }
