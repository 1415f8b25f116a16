"""The plain-torch engine for one process: the answer that every other engine must give."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_ft.engine.anchors import anchor_bytes, take_anchors
from dist_ft.engine.averages import WeightAverage
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
    nothing,
    on_device,
    seed_random_numbers,
)
from dist_ft.engine.ds_groups import Partitioning
from dist_ft.engine.gradient_probe import GradientProbe, shared_matrices
from dist_ft.engine.held_rows import HeldRows
from dist_ft.engine.layer_modes import LayerModes
from dist_ft.engine.mixing import MixedGroup, Mixing
from dist_ft.engine.trunk_pass import TrunkPass, prefix_counts
from dist_ft.engine.turns import OwnTurn, Turn, passes_of, work_of
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
        self.before_change: Callable[[], None] = nothing
        self.module = module
        self.options = options
        self._groups = list(param_groups)
        self._modes = modes or LayerModes.none()
        self._parameters = {n.removeprefix("model."): p for n, p in module.named_parameters()}
        self._fixed = self._parameters.keys() - {n for g in param_groups for n in g.parameters}
        self._device = next(module.parameters()).device
        self._trainable: frozenset[str] = frozenset(g.layer_group for g in self._groups)
        self._anchors = take_anchors(
            self._groups, weights=self._parameters, zero_stage=0, rank=0, world_size=1
        )
        self._held_rows = HeldRows.of(self._groups)
        self._held_rows.watch(self._parameters)
        self._whole = Partitioning(0, "fp32", 0, 1)
        self._sizes = {
            g.name: [(n, self._parameters[n].numel()) for n in g.parameters] for g in self._groups
        }
        self._mixing = Mixing(options.seed)
        self._probe = GradientProbe()
        self._average = WeightAverage(options.averaging, self._sizes, self._whole)
        self._optimizer = GroupAdamW(
            [
                {
                    "params": [self._parameters[n] for n in g.parameters],
                    "lr": g.lr,
                    "weight_decay": g.weight_decay,
                    "penalty": g.penalty,
                    "anchors": self._anchors.get(g.name, []),
                    "held": [self._held_elements(g, n) for n in g.parameters],
                }
                for g in self._groups
            ],
            betas=options.betas,
            eps=options.eps,
        )

    def _held_elements(self, group: ParamGroup, name: str) -> list[tuple[int, int]]:
        width = self._parameters[name][0].numel() if name in group.held_rows else 0
        return [(first * width, end * width) for first, end in group.held_rows.get(name, ())]

    def train_step(
        self,
        step: int,
        *,
        task: str,
        micro_batches: Sequence[MicroBatchLike],
        global_count: int,
        learning_rates: Mapping[str, float],
        loss_limit: float = math.inf,
        joined: Sequence[Turn] = (),
    ) -> StepResult:
        """Run one optimizer step; see `Engine.train_step`."""
        self._modes.enter_train(self.module)
        turns = (OwnTurn(task, micro_batches, global_count), *joined)
        tasks = frozenset(turn.task for turn in turns)
        ways = self._modes.passes.of_turns(step, turns=turns, device=self._device, in_step=False)
        mixed = self._mixed(tasks)
        if mixed:
            self.before_change()
        self._mixing.begin(step, groups=mixed, parameters=self._parameters)
        with self._mixing.ending(), self._probe.watching(self._shared(), turns=len(turns)):
            losses, lacked = self._accumulate(step, turns=turns, ways=ways)
        norm = self._clip()
        shares = losses.tolist()
        refused = loss_problem(sum(shares), limit=loss_limit) or gradient_problem(norm)
        for group, param_group in zip(self._groups, self._optimizer.param_groups, strict=True):
            param_group["lr"] = learning_rates[group.layer_group]
            param_group["active"] = group.is_active(tasks, trainable=self._trainable)
        self.before_change()
        if refused is None:
            self._optimizer.step()
            self._update_average(step + 1)
        self._optimizer.zero_grad(set_to_none=True)
        own = tuple(share * len(turns) for share in shares)
        norms = self._probe.norms()
        return StepResult(
            losses.sum(), norm, refused, lacked_memory=lacked, turn_losses=own,
            turn_shares=own, shared_norms=norms,
            prefix=prefix_counts(ways),
        )  # fmt: skip

    def _accumulate(
        self, step: int, *, turns: Sequence[Turn], ways: Sequence[TrunkPass | None]
    ) -> tuple[Tensor, str | None]:
        """Run a step forward and backward; return each turn's loss, and what did not fit."""
        losses = torch.zeros(len(turns), dtype=torch.float32, device=self._device)
        for work, way in zip(work_of(turns), ways, strict=True):
            self._probe.turn = work.turn
            seed = micro_batch_seed(self.options.seed, step=step, index=work.batch.index)
            seed_random_numbers(seed, self._device)
            try:
                for _ in range(passes_of(self.module, work.task)):
                    loss_sum, _ = self._run(work.task, work.batch, way)
                    scaled = loss_sum * work.share
                    scaled.backward()
                    losses[work.turn] += scaled.detach()
            except torch.OutOfMemoryError as error:
                losses[work.turn] += float("nan")
                return losses, f"{len(work.batch.rows)} rows: {str(error).splitlines()[0]}"
        return losses, None

    def _shared(self) -> list[nn.Parameter]:
        names = shared_matrices(self._groups, trainable=self._trainable)
        return [self._parameters[n] for n in names] if self.options.watch_shared else []

    def _mixed(self, tasks: frozenset[str]) -> list[MixedGroup]:
        return [
            MixedGroup(
                g,
                [self._parameters[n].data.view(-1) for n in g.parameters],
                self._anchors[g.name],
                self._whole.layouts(self._sizes[g.name]),
            )
            for g in self._groups
            if g.mixout and g.is_active(tasks, trainable=self._trainable)
        ]

    def _update_average(self, done: int) -> None:
        masters = {
            g.name: [self._parameters[n] for n in g.parameters]
            for g in self._groups
            if g.layer_group in self._trainable
        }
        self._average.update(done, masters=masters)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let forwards inside the context use the average of the weights, if one is kept."""
        self.before_change()
        kept: dict[str, Tensor] = {}
        try:
            for name, value in self._average.whole():
                kept[name] = self._parameters[name].detach().clone()
                self._parameters[name].data.view(-1).copy_(value)
            yield
        finally:
            for name, value in kept.items():
                self._parameters[name].data.copy_(value)

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

    def set_trainable(self, groups: Iterable[str], *, loads: bool = False) -> PhaseReport:
        """Train exactly these layer groups from the next step on; see `Engine.set_trainable`."""
        self.before_change()
        began = time.monotonic()
        wanted = frozenset(groups)
        for name in self._fixed:
            self._parameters[name].requires_grad_(False)
        for group in self._groups:
            trains = group.layer_group in wanted
            returns = trains and group.layer_group not in self._trainable
            for name in group.parameters:
                parameter = self._parameters[name]
                parameter.requires_grad_(trains)
                if returns and self.options.returning == "reset":
                    self._optimizer.state.pop(parameter, None)
        self._trainable = wanted
        self._held_rows.watch(self._parameters)
        if not loads:
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

    def own_seconds(self) -> float:
        """Return 0: the only rank waits for nobody, and nobody for it."""
        return 0.0

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
        slices = [
            StateSlice(name, 0, {"weight": self._parameters[name].detach().view(-1)})
            for name in sorted(self._fixed)
        ]
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
        return self._average.add_to(EngineState(slices, steps, tuple(sorted(self._trainable))))

    @torch.no_grad()
    def load_state(self, source: StateSource) -> None:
        """Take over saved weights, moments and step counts."""
        self.before_change()
        for name in sorted(self._fixed):
            self._load_weight(source, name)
        for group in self._groups:
            for name in group.parameters:
                self._load_weight(source, name)
                self._load_moments(source, name=name, steps=source.steps.get(group.name, 0))
        self._average.load(source)
        self._modes.apply(self._trainable, weight=self._parameters.__getitem__)

    def _load_weight(self, source: StateSource, name: str) -> None:
        parameter = self._parameters[name]
        weight = source.read("weight", name, start=0, length=parameter.numel())
        if weight is None:
            raise ValueError(f"the checkpoint has no weights for {name}: use its own recipe")
        # A checkpoint of a bf16 run holds the exact fp32 values as masters.
        master = source.read("master", name, start=0, length=parameter.numel())
        parameter.view(-1).copy_(weight if master is None else master)

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
        self.before_change()
        self._optimizer.state.clear()
        free_weights(self.module)
