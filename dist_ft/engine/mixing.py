"""Mixout of the weights that a rank computes with, for the length of one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dist_ft.engine.ds_state import OwnerLayout
from dist_ft.optim.mixout import kept_elements, mix, mixout_key
from dist_ft.optim.param_groups import ParamGroup


@dataclass(frozen=True)
class MixedGroup:
    """A parameter group whose weights are to be mixed, and this rank's share of it.

    Attributes:
        group: The parameter group.
        shares: What this rank holds of the weights that it computes with; flat, written to.
        starts: As much of the starting weights.
        layouts: Which parameters' elements each share holds.
    """

    group: ParamGroup
    shares: Sequence[Tensor]
    starts: Sequence[Tensor]
    layouts: Sequence[OwnerLayout]


@dataclass
class Mixing:
    """Mixes weights before a step's forwards, and gives the true ones back before its update.

    The paper draws a mask for each mini-batch: here for the step, whose micro-batches are one
    mini-batch to the optimizer, so the result does not depend on how they are dealt out. Each rank
    mixes its own share of the weights with its own share of the start; the draws are functions of
    (seed, step, parameter, element). What mixing means for the gradient is done where autograd
    leaves it, before anything is reduced: norms and clipping see the gradient of the true weights.

    Attributes:
        seed: Of the run.
    """

    seed: int
    _true: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _hooks: list[RemovableHandle] = field(default_factory=list)

    def begin(
        self, step: int, *, groups: Sequence[MixedGroup], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Mix the weights of `groups`; the shares must be published before the first forward."""
        for mixed in groups:
            probability = mixed.group.mixout
            for share, start, layout in zip(mixed.shares, mixed.starts, mixed.layouts, strict=True):
                self._true.append((share, share.detach().clone()))
                for piece in layout.pieces:
                    window = slice(piece.offset, piece.offset + piece.length)
                    kept = kept_elements(
                        mixout_key(self.seed, step=step, parameter=piece.parameter),
                        start=piece.start,
                        length=piece.length,
                        probability=probability,
                        device=share.device,
                    )
                    mix(share[window], start[window], kept=kept, probability=probability)
            for name in mixed.group.parameters:
                key = mixout_key(self.seed, step=step, parameter=name)
                hook = _masked(key, probability=probability)
                self._hooks.append(parameters[name].register_hook(hook))

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Give this rank's share of the weights its true values again at the end of the context.

        Also after an error: shares may be masters.
        """
        try:
            yield
        finally:
            with torch.no_grad():
                for share, true in self._true:
                    share.copy_(true)
            for hook in self._hooks:
                hook.remove()
            self._true, self._hooks = [], []


def _masked(key: int, *, probability: float) -> Callable[[Tensor], Tensor]:
    """Return a hook that turns the gradient of mixed weights into that of the true ones."""

    def hook(gradient: Tensor) -> Tensor:
        kept = kept_elements(
            key,
            start=0,
            length=gradient.numel(),
            probability=probability,
            device=gradient.device,
        )
        return gradient * (kept.view_as(gradient) / (1.0 - probability)).to(gradient.dtype)

    return hook
