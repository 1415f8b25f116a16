"""A rank's optimizer state under DeepSpeed, by parameter group, in every ZeRO stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dist_ft.engine.base import StateSlice, StateSource
from dist_ft.engine.layout import Piece, fair_share, owned_pieces, partition_numel
from dist_ft.optim.adamw import GroupAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OwnerLayout:
    """Which parameters' elements a flat tensor of the inner optimizer holds."""

    numel: int
    pieces: tuple[Piece, ...]


@dataclass
class Owner:
    """The tensor that the inner optimizer updates, and its moments.

    Attributes:
        layout: What the tensor holds: a rank's partition of a parameter group under ZeRO 1-3, a
            whole parameter under ZeRO 0.
        master: fp32 values; None where the weights themselves are fp32 and hold the same.
        moments: ``exp_avg`` and ``exp_avg_sq`` of the same shape, or empty before the first step.
    """

    layout: OwnerLayout
    master: Tensor | None = None
    moments: dict[str, Tensor] = field(default_factory=dict)

    def park(self, *, with_master: bool) -> None:
        """Move moments (and the master) to host memory: no copy on a CPU run."""
        if not with_master:
            self.master = None
        elif self.master is not None:
            self.master = self.master.detach().to("cpu")
        self.moments = {key: value.to("cpu") for key, value in self.moments.items()}

    def nbytes(self) -> int:
        """Return the bytes of master and moments."""
        return self.moment_bytes() + (0 if self.master is None else _nbytes(self.master))

    def moment_bytes(self) -> int:
        """Return the bytes of the moments."""
        return sum(_nbytes(tensor) for tensor in self.moments.values())

    def moment_square(self) -> float:
        """Return the squared L2 norm of the first moment, 0 before the first step."""
        first = self.moments.get("exp_avg")
        return 0.0 if first is None else float(first.square().sum())


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def owner_layouts(
    sizes: Sequence[tuple[str, int]], *, zero_stage: int, rank: int, world_size: int
) -> list[OwnerLayout]:
    """Return the layouts of a parameter group's owners on `rank`."""
    if zero_stage == 0:
        return [OwnerLayout(n, (Piece(name, 0, n, 0),)) for name, n in sizes]
    pieces = owned_pieces(sizes, zero_stage=zero_stage, rank=rank, world_size=world_size)
    numel = partition_numel(sizes, zero_stage=zero_stage, world_size=world_size)
    return [OwnerLayout(numel, tuple(pieces))]


def engine_masters(ds_engine: Any, *, zero_stage: int, precision: str, index: int) -> list[Tensor]:
    """Return the tensors that DeepSpeed's inner optimizer updates for parameter group `index`.

    The attribute names are DeepSpeed's own and not part of its interface; the distributed tests
    compare what they hold with the reference, so a rename or a change of meaning fails there.
    """
    if zero_stage == 3:
        return [ds_engine.optimizer.fp32_partitioned_groups_flat[index]]
    if zero_stage in (1, 2):
        return [ds_engine.optimizer.single_partition_of_fp32_groups[index]]
    if precision == "fp32":
        return list(ds_engine.optimizer.param_groups[index]["params"])
    return list(ds_engine.optimizer.fp32_groups[index])


def capture(
    masters: Sequence[Tensor], *, layouts: Sequence[OwnerLayout], inner: GroupAdamW
) -> list[Owner]:
    """Return the owners of a group as the engine holds them now, without copying."""
    owners: list[Owner] = []
    for master, layout in zip(masters, layouts, strict=True):
        if master.numel() != layout.numel:
            raise RuntimeError(
                f"DeepSpeed's partition has {master.numel()} elements where dist_ft expects "
                f"{layout.numel}: this DeepSpeed version lays its groups out otherwise; "
                "install the version of constraints.txt"
            )
        state = inner.state.get(master, {})
        owners.append(Owner(layout, master, {k: state[k] for k in MOMENTS if k in state}))
    return owners


@torch.no_grad()
def install(
    owners: Sequence[Owner], *, masters: Sequence[Tensor], inner: GroupAdamW, steps: int
) -> None:
    """Give a fresh engine's group the masters and moments that `owners` carry.

    The moments are handed over, not copied: a phase change costs no second copy of them.
    """
    for owner, master in zip(owners, masters, strict=True):
        if owner.master is not None and owner.master is not master:
            master.copy_(owner.master.view_as(master))
        if not owner.moments:
            inner.state.pop(master, None)
            continue
        # Not `ensure_state`: zeros for all moments, only to be replaced, are most of a change.
        state = inner.state[master]
        state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=master.device)
        for key in MOMENTS:
            state[key] = owner.moments[key].to(master.device).view_as(master)


def group_steps(masters: Sequence[Tensor], *, inner: GroupAdamW) -> int:
    """Return how many updates the group's parameters have had (0 before the first)."""
    return max((int(inner.state[m]["step"]) for m in masters if inner.state.get(m)), default=0)


def share_of_owner(
    owner: Owner, *, with_master: bool, share: tuple[int, int] | None
) -> list[StateSlice]:
    """Return an owner's state as named slices, as views.

    Args:
        owner: What to describe.
        with_master: Leave the master out where it equals the weight (fp32 runs).
        share: (rank, world size) when every rank holds the whole owner (ZeRO-0), to return only
            this rank's fair part of it; None otherwise.
    """
    tensors: dict[str, Tensor] = dict(owner.moments)
    if with_master and owner.master is not None:
        tensors["master"] = owner.master.detach()
    if not tensors:
        return []
    pieces: Sequence[Piece] = owner.layout.pieces
    if share is not None:
        rank, world = share
        sizes = [(p.parameter, p.length) for p in pieces]
        pieces = [
            Piece(name, start, length, start)
            for name, start, length in fair_share(sizes, rank=rank, world_size=world)
        ]
    return [
        StateSlice(
            p.parameter,
            p.start,
            {key: t.view(-1)[p.offset : p.offset + p.length] for key, t in tensors.items()},
        )
        for p in pieces
    ]


@torch.no_grad()
def read_owner(layout: OwnerLayout, *, source: StateSource, stepped: bool) -> Owner:
    """Return an owner with saved values; moments exist exactly where the group has stepped."""
    owner = Owner(layout, torch.zeros(layout.numel))
    if stepped:
        owner.moments = {key: torch.zeros(layout.numel) for key in MOMENTS}
    for piece in layout.pieces:
        window = slice(piece.offset, piece.offset + piece.length)
        assert owner.master is not None
        owner.master[window].copy_(read_master(source, piece))
        for key, tensor in owner.moments.items():
            value = source.read(key, piece.parameter, start=piece.start, length=piece.length)
            if value is None:
                raise ValueError(
                    f"the checkpoint has steps but no {key} for {piece.parameter}: "
                    "it is damaged; resume from an earlier one"
                )
            tensor[window].copy_(value)
    return owner


def read_master(source: StateSource, piece: Piece) -> Tensor:
    """Return the saved fp32 values of a piece: its master, or its weight if none was kept.

    Raises:
        ValueError: If the checkpoint has neither.
    """
    for kind in ("master", "weight"):
        value = source.read(kind, piece.parameter, start=piece.start, length=piece.length)
        if value is not None:
            return value
    raise ValueError(
        f"the checkpoint has no weights for {piece.parameter}: resume with the recipe that wrote it"
    )
