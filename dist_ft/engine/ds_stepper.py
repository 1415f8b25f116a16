"""What becomes of a step's gradients under DeepSpeed: refused by all ranks, or an update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_ft.dist import all_reduce_sum
from dist_ft.engine.base import EngineOptions, gradient_problem, loss_problem
from dist_ft.engine.ds_arriving import ArrivingWeights
from dist_ft.engine.ds_config import DeepSpeedOptions, clips_itself
from dist_ft.engine.ds_gradients import OwnedGradients, check_order
from dist_ft.engine.ds_step import PartitionedStep, hand_norm, square_sum
from dist_ft.engine.ds_weights import WeightAccess
from dist_ft.optim.adamw import GroupAdamW
from dist_ft.optim.param_groups import ParamGroup


@dataclass(frozen=True)
class Update:
    """What became of a step's gradients.

    Attributes:
        norm: Of the gradient before clipping; None if the engine has none.
        refused: Why nothing was updated; None if it was.
        sums: The loss of each turn, over all ranks.
        applied: Whether weights were updated; fp16 gradients that overflow do not count as refused.
    """

    norm: float | None
    refused: str | None
    sums: Sequence[float]
    applied: bool


class Stepper:
    """Ends the steps of one DeepSpeed engine, by `PartitionedStep` where that can."""

    def __init__(
        self,
        engine: Any,
        *,
        inner: GroupAdamW,
        held: Sequence[ParamGroup],
        options: EngineOptions,
        deepspeed_options: DeepSpeedOptions,
        weights: WeightAccess,
        arriving: ArrivingWeights,
    ) -> None:
        """Take over a fresh engine whose optimizer `inner` has the parameter groups `held`."""
        self._engine, self._inner, self._held = engine, inner, tuple(held)
        self.options, self._ds, self._weights = options, deepspeed_options, weights
        names = [g.layer_group for g in held]
        self._step = PartitionedStep.of(engine, inner=inner, arriving=arriving, layer_groups=names)
        self.gradients = OwnedGradients.of(engine)

    def close(self) -> None:
        """Let go of the engine's parameters."""
        if self.gradients is not None:
            self.gradients.close()

    def update(
        self,
        shares: Sequence[float],
        *,
        reached: Sequence[int],
        learning_rates: Mapping[str, float],
        loss_limit: float,
    ) -> Update:
        """Update what trains, unless the ranks' loss or gradient is bad.

        Args:
            shares: This rank's share of each turn's loss.
            reached: Indices of the held parameter groups that train in this step.
            learning_rates: By layer group.
            loss_limit: Largest loss that is believed.
        """
        if self._step is None:
            return self._by_deepspeed(
                shares, reached=reached, learning_rates=learning_rates, loss_limit=loss_limit
            )
        order = 0 if self.gradients is None else self.gradients.take_order()
        *sums, square, orders, squares = all_reduce_sum(
            [*shares, float(self._step.square(reached)), order, order * order]
        )
        check_order(orders, squares)
        norm = math.sqrt(square)
        refused = loss_problem(sum(sums), limit=loss_limit) or gradient_problem(norm)
        self._activate(reached, learning_rates)
        limit = self.options.max_grad_norm
        factor = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
        self._step.apply(reached if refused is None else (), factor=factor)
        return Update(norm, refused, sums, applied=refused is None)

    def _by_deepspeed(
        self,
        shares: Sequence[float],
        *,
        reached: Sequence[int],
        learning_rates: Mapping[str, float],
        loss_limit: float,
    ) -> Update:
        """Do as `update` with DeepSpeed's own step."""
        engine = self._engine
        square = None
        if finds_norm := self._ds.zero_stage == 3 and not self._ds.offload_optimizer:
            square = self._square_of_partitions(reached)
        *sums, squares = _totals(shares, square)
        if finds_norm:
            hand_norm(engine.optimizer, math.sqrt(squares))
        refused = loss_problem(sum(sums), limit=loss_limit)
        norm = self._clip_whole_gradients()
        refused = refused or gradient_problem(norm)
        self._activate(reached, learning_rates if refused is None else {})
        engine.step()
        if self._ds.zero_stage == 3 and engine.optimizer.grad_partitions_flat_buffer is not None:
            # A head outside this step's task would find its last gradient here again.
            engine.optimizer.grad_partitions_flat_buffer.zero_()
        if norm is None and not self._skipped():
            norm = engine.get_global_grad_norm()
            # A gradient too large for fp16 is no fault: DeepSpeed lowers its scale and goes on.
            if not engine.was_step_applied() and self.options.precision != "fp16":
                refused = refused or gradient_problem(math.nan)
        applied = bool(engine.was_step_applied())
        return Update(None if norm is None else float(norm), refused, sums, applied)

    def _square_of_partitions(self, indices: Sequence[int]) -> Tensor:
        gradients = self._engine.optimizer.averaged_gradients
        return torch.stack([square_sum(gradients[i]) for i in indices]).sum()

    def _skipped(self) -> bool:
        """Return whether fp16 gradients overflowed: the step moved nothing but the loss scale."""
        # Asked for its norm then, DeepSpeed answers with the one of an earlier step.
        return self.options.precision == "fp16" and bool(self._engine.optimizer.overflow)

    def _activate(self, reached: Sequence[int], learning_rates: Mapping[str, float]) -> None:
        for index, group in enumerate(self._held):
            rate = learning_rates.get(group.layer_group)  # none: the update is left out
            settings = self._inner.param_groups[index]
            settings.update(lr=rate or 0.0, active=index in reached and rate is not None)

    def _clip_whole_gradients(self) -> float | None:
        if not clips_itself(self.options, self._ds):
            return None
        parameters = [p for p in self._weights.parameters().values() if p.grad is not None]
        limit = self.options.max_grad_norm or float("inf")
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))


def _totals(shares: Sequence[float], square: Tensor | None) -> list[float]:
    """Return the sums over ranks: every rank must know before any updates."""
    return all_reduce_sum([*shares, 0.0 if square is None else float(square)])
