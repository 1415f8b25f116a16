"""Measures how large the gradient of each turn of a step is in what all tasks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dist_ft.dist import sum_over_ranks
from dist_ft.optim.param_groups import ParamGroup


def shared_matrices(groups: Sequence[ParamGroup], *, trainable: frozenset[str]) -> tuple[str, ...]:
    """Return the matrices of the topmost layer group that trains and that every task reaches."""
    everybody = frozenset[str]().union(*(g.tasks for g in groups))
    for group in reversed(groups):
        shared = group.tasks == everybody and len(everybody) > 1
        if shared and group.layer_group in trainable and group.name.endswith("/decay"):
            return group.parameters
    return ()


@dataclass
class GradientProbe:
    """Adds up the gradients of some parameters turn by turn, before anything is reduced.

    ZeRO reduces what all micro-batches of a step have accumulated, in which turns can't be told
    apart. Autograd leaves a whole gradient at each parameter in every stage, so the probe keeps a
    sum per turn there: as many copies of one layer group's matrices as a step has turns, and one
    all-reduce of each.

    Attributes:
        world_size: How many times too large the engine makes the gradients of each rank.
        turn: The turn that runs.
    """

    world_size: int = 1
    turn: int = 0
    _sums: list[list[Tensor]] = field(default_factory=list)
    _turns: int = 0

    @contextmanager
    def watching(self, parameters: Sequence[nn.Parameter], *, turns: int) -> Iterator[None]:
        """Add up the gradients of `parameters` in backward passes inside the context."""
        self._turns = turns
        self._sums = [[] for _ in parameters]
        handles = [p.register_hook(self._adder(i)) for i, p in enumerate(parameters)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _adder(self, index: int) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            sums = self._sums[index]
            if not sums:
                sums += [
                    torch.zeros(gradient.shape, dtype=torch.float32, device=gradient.device)
                    for _ in range(self._turns)
                ]
            sums[self.turn] += gradient

        return add

    def norms(self) -> tuple[float, ...] | None:
        """Return the norm of each turn's gradient over all ranks; None if nothing was watched."""
        sums, self._sums = self._sums, []
        if not sums or not all(sums):
            return None
        squares = torch.zeros(self._turns, dtype=torch.float64)
        for of_parameter in sums:
            for turn, total in enumerate(of_parameter):
                sum_over_ranks(total)
                squares[turn] += float(total.square().sum(dtype=torch.float64))
        # The step's loss is a mean over turns, and the engine multiplies by the number of ranks.
        scale = self._turns / self.world_size
        return tuple(float(square) ** 0.5 * scale for square in squares)
