"""Rows of an embedding that never move, while the other rows train.

A layer group freezes as a whole, and so does a parameter: ZeRO has one gradient for it. Rows are
held by giving them no gradient (so that they have no part in the norm, and no moments) and by
putting back what weight decay does to them. They cost what trained rows cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dist_ft.engine.ds_state import OwnerLayout
from dist_ft.optim.param_groups import ParamGroup


@dataclass
class HeldRows:
    """Keeps the gradient of held rows at zero.

    Attributes:
        rows: First row and end of each range, by parameter.
    """

    rows: Mapping[str, Sequence[tuple[int, int]]]
    _hooks: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, groups: Sequence[ParamGroup]) -> HeldRows:
        """Return the held rows of all groups."""
        return cls({name: rows for g in groups for name, rows in g.held_rows.items()})

    def watch(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Watch the parameters that require a gradient now, and no others that were watched."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = [
            parameters[name].register_hook(_zeroing(rows))
            for name, rows in self.rows.items()
            if parameters[name].requires_grad
        ]


def _zeroing(rows: Sequence[tuple[int, int]]) -> Any:
    def zeroed(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()  # somebody else may hold it
        for first, end in rows:
            gradient[first:end] = 0
        return gradient

    return zeroed


def held_elements(
    group: ParamGroup, layouts: Sequence[OwnerLayout], *, widths: Mapping[str, int]
) -> list[list[tuple[int, int]]]:
    """Return the runs of held elements in each tensor that the optimizer updates for a group.

    Args:
        group: The parameter group.
        layouts: What each tensor holds.
        widths: Elements of a row, by parameter.
    """
    return [
        [
            (low - piece.start + piece.offset, high - piece.start + piece.offset)
            for piece in layout.pieces
            for first, end in group.held_rows.get(piece.parameter, ())
            for low, high in [
                (
                    max(piece.start, first * widths[piece.parameter]),
                    min(piece.start + piece.length, end * widths[piece.parameter]),
                )
            ]
            if low < high
        ]
        for layout in layouts
    ]


@torch.no_grad()
def row_widths(groups: Sequence[ParamGroup], parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the elements of a row of each parameter with held rows, before it is partitioned."""
    return {n: parameters[n][0].numel() for g in groups for n in g.held_rows}
