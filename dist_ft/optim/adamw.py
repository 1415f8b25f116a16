"""AdamW that leaves the parameter groups of inactive layer groups alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dist_ft.optim.penalties import add_penalty


class GroupAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019) that steps only the groups flagged as active.

    A group whose ``active`` entry is False keeps its parameters, its moments and its step count:
    no decay and no momentum, as if plain torch had been given no gradient for it. That is what a
    frozen layer group and the head of a task outside this step's batch need; ZeRO gives both a
    zero gradient instead of none.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """Build the optimizer; every group carries its own ``lr`` and ``weight_decay``.

        A group may have a ``penalty`` and, if that needs them, ``anchors``: the start of each of
        its parameters. It may have ``held``: for each parameter the runs of its elements that have
        no gradient and are not decayed either.
        """
        super().__init__(groups, lr=0.0, betas=betas, eps=eps, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters of the active groups; return what `closure` returned."""
        with self._only(group for group in self.param_groups if group.get("active", True)):
            for group in self.param_groups:
                penalty = group.get("penalty")
                # ZeRO-3 steps one group at a time and empties the others.
                if penalty is not None and not penalty.is_empty and group["params"]:
                    add_penalty(group["params"], penalty, anchors=group.get("anchors", ()))
            held = list(self._held())
            result = super().step(closure)
            for run, value in held:
                run.copy_(value)
            return result

    def _held(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each run of elements that is to stay, with what it holds now."""
        for group in self.param_groups:
            # ZeRO-3 empties the groups that it does not step.
            for parameter, runs in zip(group["params"], group.get("held", ()), strict=False):
                for first, end in runs:
                    run = parameter.view(-1)[first:end]
                    yield run, run.clone()

    def step_groups(self, indices: Sequence[int]) -> None:
        """Update those of the parameter groups `indices` that are active."""
        with self._only([self.param_groups[i] for i in indices]):
            self.step()

    @contextmanager
    def _only(self, groups: Iterable[dict[str, Any]]) -> Iterator[None]:
        everything = self.param_groups
        self.param_groups = list(groups)
        try:
            yield
        finally:
            self.param_groups = everything

    def ensure_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the moments and step count of `parameter`, as zeros if it never stepped."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state
