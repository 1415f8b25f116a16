"""DeepSpeed ZeRO 0-3 behind the engine protocol, with exact phase changes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ft.dist import all_reduce_sum
from dist_ft.engine.anchors import anchor_bytes, take_anchors
from dist_ft.engine.averages import WeightAverage
from dist_ft.engine.base import (
    DTYPES,
    EngineOptions,
    EngineState,
    MicroBatchLike,
    PhaseReport,
    StateSource,
    StepResult,
    Switch,
    free_weights,
    nothing,
    on_device,
)
from dist_ft.engine.ds_accumulation import Accumulation, gradient_factor
from dist_ft.engine.ds_arriving import ArrivingWeights
from dist_ft.engine.ds_config import DeepSpeedOptions, build_ds_config
from dist_ft.engine.ds_detach import (
    ModuleSnapshot,
    collect_garbage,
    destroy_engine,
    exempt_from_collection,
    include_in_collection,
)
from dist_ft.engine.ds_groups import GroupStates, Partitioning, optimizer_group
from dist_ft.engine.ds_loss_scale import read_loss_scale, write_loss_scale
from dist_ft.engine.ds_setup import check_precision, set_up_deepspeed, start_engine
from dist_ft.engine.ds_stepper import Stepper
from dist_ft.engine.ds_weights import FloatBuffers, WeightAccess
from dist_ft.engine.ds_working import WorkingWeights, begin_mixing, replaced
from dist_ft.engine.element_counts import element_counts, fixed_sizes, group_sizes, require_grad
from dist_ft.engine.gradient_probe import GradientProbe, shared_matrices
from dist_ft.engine.held_rows import HeldRows, held_elements, row_widths
from dist_ft.engine.layer_modes import LayerModes
from dist_ft.engine.mixing import Mixing
from dist_ft.engine.own_time import OwnTime
from dist_ft.engine.parking import ParkedPrefix
from dist_ft.engine.trunk_pass import TrunkPass, needs_prefix, prefix_counts
from dist_ft.engine.turns import OwnTurn, Turn
from dist_ft.optim.adamw import GroupAdamW
from dist_ft.optim.param_groups import ParamGroup


class DeepSpeedEngine:
    """Trains a module under ZeRO and changes what trains without losing a bit of state.

    Every layer group has optimizer parameter groups of its own, so a rank's partition of a group
    is the same vector in every phase. A phase change moves masters and moments group by group,
    without communication. There are two ways, chosen by `switch`:

    - ``rebuild``: take the DeepSpeed engine down and build one over the groups that train now.
      Memory, gradient traffic and all-gather follow the trainable share; costs seconds.
    - ``in_place``: one engine over every group that ever trains; groups that do not train are
      skipped by the optimizer and their moments parked on the host; costs milliseconds.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        param_groups: Sequence[ParamGroup],
        options: EngineOptions,
        deepspeed_options: DeepSpeedOptions,
        switch: Switch = "rebuild",
        modes: LayerModes | None = None,
    ) -> None:
        """Take over `module`; the process group must be up. `set_trainable` comes next."""
        set_up_deepspeed()
        check_precision(options.precision, zero_stage=deepspeed_options.zero_stage)
        exempt_from_collection()
        self._buffers = FloatBuffers(module)
        self.before_change: Callable[[], None] = nothing
        self._module = module.to(DTYPES[options.precision])
        self._buffers.restore()
        self.options = options
        self.switch: Switch = switch
        self._ds = deepspeed_options
        self._modes = modes or LayerModes.none()
        self._groups = list(param_groups)
        self._world = dist.get_world_size()
        self._sizes = group_sizes(module, self._groups)
        self._weights = WeightAccess(module, zero_stage=deepspeed_options.zero_stage)
        self._anchors = take_anchors(
            self._groups,
            weights=self._weights.parameters(),
            zero_stage=deepspeed_options.zero_stage,
            rank=dist.get_rank(),
            world_size=self._world,
        )
        self._held_rows = HeldRows.of(self._groups)
        self._row_widths = row_widths(self._groups, self._weights.parameters())
        # Weights of no parameter group never train: those beside an adapter.
        self._fixed = fixed_sizes(module, self._groups)
        self._snapshot = ModuleSnapshot(module)
        self._trainable: frozenset[str] = frozenset()
        partitioning = Partitioning(
            deepspeed_options.zero_stage, options.precision, dist.get_rank(), self._world
        )
        self._states = GroupStates(self._sizes, partitioning)
        whole = deepspeed_options.zero_stage < 3 and switch == "rebuild"
        self._prefix = ParkedPrefix.of(self._modes.passes, module, can_go=whole)
        self._mixing = Mixing(options.seed)
        self._average = WeightAverage(options.averaging, self._sizes, partitioning)
        self._loss_scale: dict[str, float] = {}  # of the engine that was taken down last
        self._own_time = OwnTime()
        self._arriving = ArrivingWeights()
        self._own_time.leave_out(self._arriving, "take")
        self._engine: Any = None
        self._stepper: Any = None
        self._inner: GroupAdamW | None = None
        self._probe = GradientProbe(gradient_factor(deepspeed_options))
        self._universe: frozenset[str] = frozenset(g.layer_group for g in self._groups)

    def limit_universe(self, groups: Iterable[str]) -> None:
        """Tell an in-place engine which layer groups can ever train; the others get no state."""
        self._universe = frozenset(groups)

    def set_trainable(self, groups: Iterable[str], *, loads: bool = False) -> PhaseReport:
        """Train exactly these layer groups from the next step on; see `Engine.set_trainable`."""
        self._have_all_weights()
        began = time.monotonic()
        wanted = frozenset(groups)
        returning = wanted - self._trainable
        held = self._universe | wanted if self.switch == "in_place" else wanted
        if self._engine is None or held != {g.layer_group for g in self._states.held}:
            self._rebuild(held, wanted=wanted)
            how: Switch = "rebuild"
        else:
            self._set_requires_grad(wanted)
            how = "in_place"
        if self.options.returning == "reset":
            self._states.forget_moments(returning)
        self._states.settle(wanted)
        self._trainable = wanted
        self._average.park(wanted)
        if not loads:
            self._modes.apply(wanted, weight=self._weights.whole)
        return self._report(how, seconds=time.monotonic() - began)

    @property
    def module(self) -> nn.Module:
        """The model, with the weights that the last step has left."""
        self._have_all_weights()
        return self._module

    def _have_all_weights(self) -> None:
        self._arriving.settle()
        self.before_change()
        self._prefix.bring_back()

    def _rebuild(self, held: frozenset[str], *, wanted: frozenset[str]) -> None:
        self._take_down()
        groups = [g for g in self._groups if g.layer_group in held]
        parameters = self._weights.parameters()
        # DeepSpeed leaves out what needs no gradient when it builds its groups.
        self._set_requires_grad(held)
        self._inner = GroupAdamW(
            [
                optimizer_group(
                    g,
                    parameters=parameters,
                    anchors=self._anchors,
                    held=held_elements(g, self._states.layouts(g.name), widths=self._row_widths),
                )
                for g in groups
            ],
            betas=self.options.betas,
            eps=self.options.eps,
        )
        elements = sum(n for g in groups for _, n in self._sizes[g.name])
        config = build_ds_config(self.options, deepspeed=self._ds, trainable_elements=elements)
        self._engine = start_engine(self._module, optimizer=self._inner, config=config)
        write_loss_scale(self._engine, precision=self.options.precision, state=self._loss_scale)
        if self._ds.zero_stage == 3:
            coordinator = self._engine.optimizer.parameter_offload.get_param_coordinator()
            self._own_time.leave_out(coordinator, "fetch_sub_module")
        self._buffers.restore()
        self._states.attach(self._engine, inner=self._inner, held=groups)
        self._stepper = Stepper(
            self._engine,
            inner=self._inner,
            held=groups,
            options=self.options,
            deepspeed_options=self._ds,
            weights=self._weights,
            arriving=self._arriving,
        )
        self._arriving.watch(self._modes.blocks)
        self._held_rows.watch(parameters)
        self._set_requires_grad(wanted)

    def _take_down(self) -> None:
        """Park the state of the engine's groups and leave the module as it was before."""
        if self._engine is None:
            if self._ds.zero_stage == 3:
                config = build_ds_config(self.options, deepspeed=self._ds, trainable_elements=0)
                self._weights.partition(config)
                self._snapshot = ModuleSnapshot(self._module)
            return
        self._states.detach()
        self._stepper.close()
        self._loss_scale = read_loss_scale(self._engine, precision=self.options.precision)
        destroy_engine(self._engine, zero_stage=self._ds.zero_stage)
        self._engine = self._inner = self._stepper = None
        self._snapshot.restore(fresh_parameters=self._ds.zero_stage < 3)
        self._weights.refresh()
        collect_garbage()

    def _set_requires_grad(self, wanted: frozenset[str]) -> None:
        parameters = self._weights.parameters()
        require_grad(parameters, wanted=wanted, groups=self._groups, fixed=self._fixed)

    def _report(self, switch: Switch, *, seconds: float) -> PhaseReport:
        """Return what the change did, read from the parameters and the optimizer's tensors."""
        parameters = self._weights.parameters()
        trainable, frozen = element_counts(parameters, sizes=self._sizes, fixed=self._fixed)
        return PhaseReport(
            switch=switch,
            switch_s=seconds,
            trainable_params=trainable,
            frozen_params=frozen,
            optimizer_bytes=self._states.optimizer_bytes(),
            parked_bytes=self._states.parked_bytes(),
            gradient_bytes=trainable * DTYPES[self.options.precision].itemsize,
            cached_blocks=self._modes.passes.boundary,
            cache_bytes=self._modes.passes.cached_bytes,
            anchor_bytes=anchor_bytes(self._anchors),
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
        joined: Sequence[Turn] = (),
    ) -> StepResult:
        """Run one optimizer step; see `Engine.train_step`."""
        engine = self._engine
        self._modes.enter_train(self._module)
        turns = (OwnTurn(task, micro_batches, global_count), *joined)
        tasks = frozenset(turn.task for turn in turns)
        stage3 = self._ds.zero_stage == 3
        passes = self._modes.passes
        ways = passes.of_turns(step, turns=turns, device=engine.device, in_step=stage3)
        self._prefix.settle(needed=needs_prefix(ways))
        mixed = self._begin_mixing(step, tasks=tasks)
        accumulation = Accumulation(
            engine, run=self._run, passes=passes, own_time=self._own_time, probe=self._probe,
            options=self.options, deepspeed_options=self._ds, gradients=self._stepper.gradients,
        )  # fmt: skip
        with self._mixing.ending(), self._probe.watching(self._shared(), turns=len(turns)):
            losses = accumulation.over(step, turns=turns, ways=ways)
        self.before_change()
        shares = losses.tolist()
        done = self._stepper.update(
            shares,
            reached=self._reached(tasks),
            learning_rates=learning_rates,
            loss_limit=loss_limit,
        )
        if mixed and not done.applied:
            WorkingWeights(engine, self._ds.zero_stage).publish(mixed)
        if done.refused is None and done.applied:
            self._average.update(step + 1, masters=self._states.masters_of(self._trainable))
        return StepResult(
            losses.sum(),
            done.norm,
            done.refused,
            lacked_memory=accumulation.lacked,
            prefix=prefix_counts(ways, parked_bytes=self._prefix.parked_bytes),
            turn_losses=tuple(total * len(turns) for total in done.sums),
            turn_shares=tuple(share * len(turns) for share in shares),
            shared_norms=self._probe.norms(),
        )

    def _reached(self, tasks: frozenset[str]) -> list[int]:
        """Return the held parameter groups that train and that the tasks' losses reach."""
        held = enumerate(self._states.held)
        return [i for i, g in held if g.is_active(tasks, trainable=self._trainable)]

    def _shared(self) -> list[nn.Parameter]:
        names = shared_matrices(self._groups, trainable=self._trainable)
        return [self._weights.parameters()[n] for n in names if self.options.watch_shared]

    def _begin_mixing(self, step: int, *, tasks: frozenset[str]) -> list[int]:
        """Mix what mixout applies to in this step; return the held groups' indices."""
        reached = self._reached(tasks)
        groups = {i: g for i, g in enumerate(self._states.held) if g.mixout and i in reached}
        if groups:
            self._arriving.settle()
            self.before_change()
            begin_mixing(
                self._mixing,
                step,
                groups=groups,
                working=WorkingWeights(self._engine, self._ds.zero_stage),
                states=self._states,
                anchors=self._anchors,
                parameters=self._weights.parameters(),
            )
        return list(groups)

    def averaged(self) -> AbstractContextManager[None]:
        """Let forwards inside the context use the average of the weights, if one is kept."""
        self._have_all_weights()
        working = WorkingWeights(self._engine, self._ds.zero_stage)
        return replaced(self._average, working=working, weights=self._weights)

    def _run(
        self, task: str, batch: MicroBatchLike, way: TrunkPass | None = None
    ) -> tuple[Tensor, Any]:
        device = self._engine.device
        inputs, targets = on_device(batch.inputs, device), on_device(batch.targets, device)
        # DeepSpeed's forward pass only prepares the backward pass that it would have to see.
        whole = self._engine if self._stepper.gradients is None else self._engine.module
        self._arriving.settle_before_forward()
        found = whole(task, inputs, targets, *(() if way is None else (way,)))
        self._arriving.settle()
        return found

    @torch.no_grad()
    def eval_forward(self, task: str, micro_batch: MicroBatchLike) -> tuple[Tensor, Any]:
        """Return summed loss and outputs without gradients, dropout off."""
        self._arriving.settle()
        self._engine.eval()
        self._modes.passes.none()
        return self._run(task, micro_batch)

    def own_seconds(self) -> float:
        """Return this rank's seconds in forward passes since the last call; see `OwnTime`."""
        return self._own_time.take()

    def moment_norms(self) -> dict[str, float]:
        """Return the L2 norm of Adam's first moment by layer group that trains."""
        squares = self._states.moment_squares(self._trainable)
        replicas = self._world if self._ds.zero_stage == 0 else 1
        sums = all_reduce_sum(list(squares.values()))
        return {n: (total / replicas) ** 0.5 for n, total in zip(squares, sums, strict=True)}

    def state(self) -> EngineState:
        """Return this rank's share of weights, masters, moments and step counts, as views."""
        self._arriving.settle()
        self._prefix.bring_back()
        slices, steps = self._states.export()
        scale = read_loss_scale(self._engine, precision=self.options.precision)
        slices = [*self._weights.slices(), *slices]
        state = EngineState(slices, steps, tuple(sorted(self._trainable)), scale)
        return self._average.add_to(state)

    @torch.no_grad()
    def load_state(self, source: StateSource) -> None:
        """Take over saved state; the phase that it was saved in, or another, must be set."""
        self._have_all_weights()
        self._weights.load(source)
        self._states.load(source)
        self._states.settle(self._trainable)
        self._average.load(source)
        self._average.park(self._trainable)
        self._modes.apply(self._trainable, weight=self._weights.whole)
        write_loss_scale(self._engine, precision=self.options.precision, state=source.loss_scale)

    def full_weights(self) -> dict[str, Tensor]:
        """Return whole parameters by name on the host: on rank 0, elsewhere an empty dict."""
        self._have_all_weights()
        return self._weights.gather()

    def close(self) -> None:
        """Free weights and optimizer state; neither the engine nor its module is of use then.

        To let go of the object is not enough: hooks keep engine and parameters alive unseen.
        """
        self._arriving.give_up()
        self._have_all_weights()
        if self._engine is not None:
            self._take_down()
        self._states.clear()
        free_weights(self._module)
        include_in_collection()
