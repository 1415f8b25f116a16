"""Lets a balancer decide what the tasks' losses weigh, once for all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dist_ft import dist
from dist_ft.config_regularization import (
    BalancingConfig,
    DwaBalancing,
    FamoBalancing,
    GradNormBalancing,
    UncertaintyBalancing,
)
from dist_ft.data.loader import StepBatch
from dist_ft.engine.base import StepResult
from dist_ft.optim.balancing import (
    Balancer,
    DynamicWeightAverage,
    Famo,
    GradNorm,
    Observation,
    UncertaintyWeights,
)
from dist_ft.train.callbacks import Watcher
from dist_ft.train.loop import Run
from dist_ft.train.recorder import Recorder


def make_balancer(config: BalancingConfig, *, tasks: Sequence[str]) -> Balancer | None:
    """Return what decides the weights; None where the recipe fixes them."""
    if isinstance(config, UncertaintyBalancing):
        return UncertaintyWeights(tasks, lr=config.lr)
    if isinstance(config, DwaBalancing):
        return DynamicWeightAverage(tasks, every=config.every, temperature=config.temperature)
    if isinstance(config, GradNormBalancing):
        return GradNorm(tasks, lr=config.lr, alpha=config.alpha)
    if isinstance(config, FamoBalancing):
        return Famo(tasks, lr=config.lr, decay=config.decay)
    return None


@dataclass
class Balance(Watcher):
    """Shows a balancer every step and hands its weights to the loss.

    Attributes:
        balancer: Decides.
        weights: What the loss reads; changed in place.
        recorder: Where ``balance`` events go.
        every: Steps between them.
    """

    balancer: Balancer
    weights: dict[str, float]
    recorder: Recorder
    every: int

    def on_fit_start(self, run: Run) -> None:
        """Take the weights of what was learnt before a resumed run stopped."""
        del run
        self._share()

    def on_step_end(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        """Learn from the step, and weigh the next one."""
        if result.refused is not None:
            self._share()  # the run may have gone back to a checkpoint
            return
        self.balancer.observe(observations(batch, result, weights=self.weights))
        self._share()
        step = run.progress.step
        if step % self.every == 0 or step == run.total_steps:
            rounded = {task: round(weight, 6) for task, weight in self.weights.items()}
            self.recorder.event("balance", step=step, weights=rounded)

    def _share(self) -> None:
        """Give every rank rank 0's weights: an exponential may differ in the last bit."""
        own = self.balancer.weights
        first = dist.rank() == 0
        shared = dist.all_reduce_sum([own[task] if first else 0.0 for task in own])
        self.weights.update(zip(own, shared, strict=True))


def observations(
    batch: StepBatch, result: StepResult, *, weights: dict[str, float]
) -> dict[str, Observation]:
    """Return what a step has shown of each of its tasks, without their weights.

    Of a task with several turns in the step, losses and norms are the means of its turns'.
    """
    turns: dict[str, list[tuple[float, float | None]]] = {}
    norms = result.shared_norms or (None,) * len(batch.turns)
    for turn, loss, norm in zip(batch.turns, result.turn_losses, norms, strict=True):
        turns.setdefault(turn.task, []).append((loss, norm))
    found: dict[str, Observation] = {}
    for task, of_task in turns.items():
        weight = weights[task]
        losses = [loss for loss, _ in of_task]
        known = [norm for _, norm in of_task if norm is not None]
        found[task] = Observation(
            math.fsum(losses) / len(losses) / weight,
            math.fsum(known) / len(known) / weight if known else None,
        )
    return found
