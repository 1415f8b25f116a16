"""The weights that a run started from, as far as a rank needs them to go back there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dist_ft.engine.ds_state import owner_layouts
from dist_ft.optim.param_groups import ParamGroup

# One tensor for each tensor that the inner optimizer updates, by parameter group.
Anchors = dict[str, list[Tensor]]


@torch.no_grad()
def take_anchors(
    groups: Sequence[ParamGroup],
    *,
    weights: Mapping[str, Tensor],
    zero_stage: int,
    rank: int,
    world_size: int,
) -> Anchors:
    """Return this rank's share of the starting weights of groups that return to them.

    L2-SP pulls weights there, mixout puts some there. The share is cut like the optimizer's own, so
    that no step communicates for it; it is in the weights' precision, which is what the masters
    start from. It is a function of the pre-trained model and the seed: a resumed run takes it again
    before it reads the checkpoint.

    Args:
        groups: All parameter groups.
        weights: Whole parameters by name, before anything has trained.
        zero_stage: 0 to 3.
        rank: This rank.
        world_size: Number of ranks.
    """
    anchors: Anchors = {}
    for group in groups:
        if not group.needs_start:
            continue
        layouts = owner_layouts(
            [(name, weights[name].numel()) for name in group.parameters],
            zero_stage=zero_stage,
            rank=rank,
            world_size=world_size,
        )
        first = weights[group.parameters[0]]
        anchors[group.name] = []
        for layout in layouts:
            share = torch.zeros(layout.numel, dtype=first.dtype, device=first.device)
            for piece in layout.pieces:
                flat = weights[piece.parameter].detach().reshape(-1)
                share[piece.offset : piece.offset + piece.length] = flat[
                    piece.start : piece.start + piece.length
                ]
            anchors[group.name].append(share)
    return anchors


def anchor_bytes(anchors: Anchors) -> int:
    """Return the bytes of this rank's share of the starting weights."""
    return sum(t.numel() * t.element_size() for tensors in anchors.values() for t in tensors)
