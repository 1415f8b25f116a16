"""The forward and backward passes of a step under DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ft.engine.base import EngineOptions, MicroBatchLike, micro_batch_seed, seed_random_numbers
from dist_ft.engine.ds_config import DeepSpeedOptions, averages
from dist_ft.engine.ds_gradients import OwnedGradients
from dist_ft.engine.gradient_probe import GradientProbe
from dist_ft.engine.out_of_memory import MemoryGuard, OneRow
from dist_ft.engine.own_time import OwnTime
from dist_ft.engine.trunk_pass import TrunkPass
from dist_ft.engine.trunk_passes import TrunkPasses
from dist_ft.engine.turns import Turn, Work, passes_of, work_of


def gradient_factor(deepspeed_options: DeepSpeedOptions) -> int:
    """Return what a loss is multiplied by, so that gradients are sums over ranks."""
    return dist.get_world_size() if averages(deepspeed_options) else 1


class Accumulation:
    """Adds up the gradients of one step's micro-batches."""

    def __init__(
        self,
        engine: Any,
        *,
        run: Callable[..., tuple[Tensor, Any]],
        passes: TrunkPasses,
        own_time: OwnTime,
        probe: GradientProbe,
        options: EngineOptions,
        deepspeed_options: DeepSpeedOptions,
        gradients: OwnedGradients | None,
    ) -> None:
        """Begin a step; `run` returns loss and outputs of (task, micro-batch, trunk pass)."""
        self._engine, self._run, self._passes = engine, run, passes
        self._own_time, self._probe = own_time, probe
        self.options, self._ds, self._gradients = options, deepspeed_options, gradients
        self._factor = gradient_factor(deepspeed_options)
        by_deepspeed = gradients is None and engine.zero_optimization()
        overlaps = bool(by_deepspeed and engine.zero_overlap_comm())
        self._is_last = False
        self._guard = MemoryGuard(deepspeed_options.zero_stage, overlaps=overlaps)

    @property
    def lacked(self) -> str | None:
        """What did not fit into the device's memory, or None."""
        return self._guard.lacked

    def over(self, step: int, *, turns: Sequence[Turn], ways: Sequence[TrunkPass | None]) -> Tensor:
        """Run a step forward and backward; return this rank's share of each turn's loss."""
        engine, works = self._engine, work_of(turns)
        losses = torch.zeros(len(turns), dtype=torch.float32, device=engine.device)
        for position, (work, way) in enumerate(zip(works, ways, strict=True)):
            self._probe.turn = work.turn
            seed = micro_batch_seed(self.options.seed, step=step, index=work.batch.index)
            seed_random_numbers(seed, engine.device)
            passes = passes_of(self._engine.module, work.task)
            for done in range(1, passes + 1):
                self._is_last = position == len(works) - 1 and done == passes
                engine.set_gradient_accumulation_boundary(self._is_last)
                losses[work.turn] += self._guard.run(
                    work.batch,
                    forward=self._share_of_loss(work, way=way, step=step),
                    backward=self._backward,
                )
        return losses

    def _share_of_loss(
        self, work: Work, *, way: TrunkPass | None, step: int
    ) -> Callable[[MicroBatchLike], Tensor]:
        """Return what runs a micro-batch forward, `way`, to its share of the global mean loss."""

        def forward(batch: MicroBatchLike) -> Tensor:
            own, share = way, work.share
            if isinstance(batch, OneRow):
                # What an objective remembers of the whole micro-batch is not this row's.
                passes_of(self._engine.module, work.task)
                share = batch.loss_weight
                (own,) = self._passes.of_step(
                    step, task=work.task, micro_batches=[batch], device=self._engine.device,
                    in_step=False,
                )  # fmt: skip
            with self._own_time.forward():
                loss_sum, _ = self._run(work.task, batch, own)
            return loss_sum * share

        return forward

    def _backward(self, share: Tensor) -> None:
        if self._gradients is not None:
            self._gradients.backward(share, last=self._is_last)
            return
        if self._ds.zero_stage == 1 and self._engine.optimizer._backward_active_depth:
            # Left by a backward pass that memory ended; nothing of it was reduced.
            self._engine.optimizer._backward_active_depth = 0
        with self._noting_reduction():
            self._engine.backward(share * self._factor, scale_wrt_gas=False)

    @contextmanager
    def _noting_reduction(self) -> Iterator[None]:
        """Note when a backward pass has come to what DeepSpeed reduces at the end of the last one.

        Memory that lacks there is no reason to do the pass again: others have gone on.
        """
        engine = self._engine
        reduce = engine.allreduce_gradients

        def noted(*arguments: Any, **options: Any) -> None:
            self._guard.reducing = True
            reduce(*arguments, **options)
            self._guard.reducing = False

        engine.allreduce_gradients = noted
        try:
            yield
        finally:
            del engine.allreduce_gradients
