"""The plain-torch engine for one process: the answer that every other engine must give."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_ft.engine.anchors import anchor_bytes, take_anchors
from dist_ft.engine.base import (
    EngineOptions,
    EngineState,
    MicroBatchLike,
    PhaseReport,
    StateSlice,
    StateSource,
    StepResult,
    free_weights,
    gradient_problem,
    loss_problem,
    micro_batch_seed,
    on_device,
)
from dist_ft.engine.layer_modes import LayerModes
from dist_ft.engine.trunk_pass import TrunkPass, prefix_counts
from dist_ft.optim.adamw import GroupAdamW
from dist_ft.optim.param_groups import ParamGroup


class ReferenceEngine:
    """AdamW over whole fp32 parameters in one process; frozen groups have no gradient at all."""

    def __init__(
        self,
        module: nn.Module,
        *,
        param_groups: Sequence[ParamGroup],
        options: EngineOptions,
        modes: LayerModes | None = None,
    ) -> None:
        """Take over `module`, which must be fp32.

        Raises:
            ValueError: If the precision is not fp32.
        """
        if options.precision != "fp32":
            raise ValueError(
                f"the reference engine computes in fp32, got engine.precision {options.precision}: "
                "set engine.precision to fp32 or engine.type to deepspeed"
            )
        self.module = module
        self.options = options
        self._groups = list(param_groups)
        self._modes = modes or LayerModes.none()
        self._parameters = {n.removeprefix("model."): p for n, p in module.named_parameters()}
        self._device = next(module.parameters()).device
        self._trainable: frozenset[str] = frozenset(g.layer_group for g in self._groups)
        self._anchors = take_anchors(
            self._groups, weights=self._parameters, zero_stage=0, rank=0, world_size=1
        )
        self._optimizer = GroupAdamW(
            [
                {
                    "params": [self._parameters[n] for n in g.parameters],
                    "lr": g.lr,
                    "weight_decay": g.weight_decay,
                    "penalty": g.penalty,
                    "anchors": self._anchors.get(g.name, []),
                }
                for g in self._groups
            ],
            betas=options.betas,
            eps=options.eps,
        )

    def train_step(
        self,
        step: int,
        *,
        task: str,
        micro_batches: Sequence[MicroBatchLike],
        global_count: int,
        learning_rates: Mapping[str, float],
        loss_limit: float = math.inf,
    ) -> StepResult:
        """Run one optimizer step; see `Engine.train_step`."""
        self._modes.enter_train(self.module)
        loss = torch.zeros((), dtype=torch.float32, device=self._device)
        ways = self._modes.passes.of_step(
            step, task=task, micro_batches=micro_batches, device=self._device, in_step=False
        )
        for batch, way in zip(micro_batches, ways, strict=True):
            seed = micro_batch_seed(self.options.seed, step=step, index=batch.index)
            torch.manual_seed(seed)
            loss_sum, _ = self._run(task, batch, way)
            scaled = loss_sum * (batch.loss_weight / global_count)
            scaled.backward()
            loss += scaled.detach()
        norm = self._clip()
        refused = loss_problem(float(loss), limit=loss_limit) or gradient_problem(norm)
        for group, param_group in zip(self._groups, self._optimizer.param_groups, strict=True):
            param_group["lr"] = learning_rates[group.layer_group]
            param_group["active"] = group.layer_group in self._trainable and task in group.tasks
        if refused is None:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, norm, refused, prefix=prefix_counts(ways))

    def _run(
        self, task: str, batch: MicroBatchLike, way: TrunkPass | None = None
    ) -> tuple[Tensor, Any]:
        inputs, targets = (
            on_device(batch.inputs, self._device),
            on_device(batch.targets, self._device),
        )
        return self.module(task, inputs, targets, *(() if way is None else (way,)))

    def _clip(self) -> float:
        parameters = [p for p in self._parameters.values() if p.grad is not None]
        limit = self.options.max_grad_norm or float("inf")
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))

    def set_trainable(self, groups: Iterable[str]) -> PhaseReport:
        """Train exactly these layer groups from the next step on; see `Engine.set_trainable`."""
        began = time.monotonic()
        wanted = frozenset(groups)
        for group in self._groups:
            trains = group.layer_group in wanted
            returns = trains and group.layer_group not in self._trainable
            for name in group.parameters:
                parameter = self._parameters[name]
                parameter.requires_grad_(trains)
                if returns and self.options.returning == "reset":
                    self._optimizer.state.pop(parameter, None)
        self._trainable = wanted
        self._modes.apply(wanted, weight=self._parameters.__getitem__)
        return self._report(time.monotonic() - began)

    def _report(self, seconds: float) -> PhaseReport:
        trainable = sum(p.numel() for p in self._parameters.values() if p.requires_grad)
        total = sum(p.numel() for p in self._parameters.values())
        active = [p for p in self._parameters.values() if p.requires_grad]
        parked = [p for p in self._parameters.values() if not p.requires_grad]
        return PhaseReport(
            switch="in_place",
            switch_s=seconds,
            trainable_params=trainable,
            frozen_params=total - trainable,
            optimizer_bytes=self._moment_bytes(active),
            parked_bytes=self._moment_bytes(parked),
            gradient_bytes=trainable * 4,
            cached_blocks=self._modes.passes.boundary,
            cache_bytes=self._modes.passes.cached_bytes,
            anchor_bytes=anchor_bytes(self._anchors),
        )

    def _moment_bytes(self, parameters: Iterable[Tensor]) -> int:
        return sum(
            t.numel() * t.element_size()
            for p in parameters
            for key, t in self._optimizer.state.get(p, {}).items()
            if key != "step"
        )

    @torch.no_grad()
    def eval_forward(self, task: str, micro_batch: MicroBatchLike) -> tuple[Tensor, Any]:
        """Return summed loss and outputs without gradients, dropout off."""
        self.module.eval()
        self._modes.passes.none()
        return self._run(task, micro_batch)

    def moment_norms(self) -> dict[str, float]:
        """Return the L2 norm of Adam's first moment by layer group that trains."""
        squares: dict[str, float] = {}
        for group in self._groups:
            for name in group.parameters if group.layer_group in self._trainable else ():
                moments = self._optimizer.state.get(self._parameters[name])
                if moments:
                    square = float(moments["exp_avg"].square().sum())
                    squares[group.layer_group] = squares.get(group.layer_group, 0.0) + square
        return {name: square**0.5 for name, square in squares.items()}

    def state(self) -> EngineState:
        """Return the whole state: the only rank has it all."""
        slices: list[StateSlice] = []
        steps: dict[str, int] = {}
        for group in self._groups:
            for name in group.parameters:
                parameter = self._parameters[name]
                values = {"weight": parameter.detach().view(-1)}
                moments = self._optimizer.state.get(parameter)
                if moments:
                    steps[group.name] = int(moments["step"])
                    values["exp_avg"] = moments["exp_avg"].view(-1)
                    values["exp_avg_sq"] = moments["exp_avg_sq"].view(-1)
                slices.append(StateSlice(name, 0, values))
        return EngineState(slices, steps, tuple(sorted(self._trainable)))

    @torch.no_grad()
    def load_state(self, source: StateSource) -> None:
        """Take over saved weights, moments and step counts."""
        for group in self._groups:
            for name in group.parameters:
                parameter = self._parameters[name]
                numel = parameter.numel()
                weight = source.read("weight", name, start=0, length=numel)
                if weight is None:
                    raise ValueError(
                        f"the checkpoint has no weights for {name}: use its own recipe"
                    )
                # A checkpoint of a bf16 run holds the exact fp32 values as masters.
                master = source.read("master", name, start=0, length=numel)
                parameter.view(-1).copy_(weight if master is None else master)
                self._load_moments(source, name=name, steps=source.steps.get(group.name, 0))
        self._modes.apply(self._trainable, weight=self._parameters.__getitem__)

    def _load_moments(self, source: StateSource, *, name: str, steps: int) -> None:
        parameter = self._parameters[name]
        first = source.read("exp_avg", name, start=0, length=parameter.numel())
        second = source.read("exp_avg_sq", name, start=0, length=parameter.numel())
        if first is None or second is None:
            self._optimizer.state.pop(parameter, None)
            return
        state = self._optimizer.ensure_state(parameter)
        state["step"].fill_(steps)
        state["exp_avg"].view(-1).copy_(first)
        state["exp_avg_sq"].view(-1).copy_(second)

    def full_weights(self) -> dict[str, Tensor]:
        """Return whole parameters by name on the host."""
        return {name: p.detach().cpu().clone() for name, p in self._parameters.items()}

    def close(self) -> None:
        """Free weights and optimizer state; neither the engine nor its module is of use then."""
        self._optimizer.state.clear()
        free_weights(self.module)
