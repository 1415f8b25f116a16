"""DeepSpeed ZeRO 0-3 behind the engine protocol, with exact phase changes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ft.dist import all_reduce_sum
from dist_ft.engine.anchors import anchor_bytes, take_anchors
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
    gradient_problem,
    loss_problem,
    micro_batch_seed,
    on_device,
)
from dist_ft.engine.ds_config import DeepSpeedOptions, build_ds_config, clips_itself
from dist_ft.engine.ds_detach import (
    ModuleSnapshot,
    collect_garbage,
    exempt_from_collection,
    include_in_collection,
)
from dist_ft.engine.ds_groups import GroupStates, Partitioning
from dist_ft.engine.ds_loss_scale import read_loss_scale, write_loss_scale
from dist_ft.engine.ds_setup import set_up_deepspeed
from dist_ft.engine.ds_weights import FloatBuffers, WeightAccess, group_sizes
from dist_ft.engine.layer_modes import LayerModes
from dist_ft.engine.parking import ParkedPrefix
from dist_ft.engine.trunk_pass import TrunkPass, needs_prefix, prefix_counts
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
        exempt_from_collection()
        if options.precision == "fp16" and deepspeed_options.zero_stage == 0:
            raise ValueError(
                "engine.precision: fp16 needs zero_stage 1 or more, got 0: raise it, or use bf16"
            )
        self._buffers = FloatBuffers(module)
        self.module = module.to(DTYPES[options.precision])
        self._buffers.restore()
        self.options = options
        self.switch: Switch = switch
        self._ds = deepspeed_options
        self._modes = modes or LayerModes.none()
        self._groups = list(param_groups)
        self._world = dist.get_world_size()
        self._sizes = group_sizes(module, self._groups)
        self._weights = WeightAccess(module, zero_stage=deepspeed_options.zero_stage)
        passes = self._modes.passes
        # Stage 3 has only a share of the weights, and an in-place engine keeps them in one buffer.
        drops = passes.drop_prefix and deepspeed_options.zero_stage < 3 and switch == "rebuild"
        self._prefix = ParkedPrefix((lambda: passes.droppable(module)) if drops else None)
        self._anchors = take_anchors(
            self._groups,
            weights=self._weights.parameters(),
            zero_stage=deepspeed_options.zero_stage,
            rank=dist.get_rank(),
            world_size=self._world,
        )
        self._snapshot = ModuleSnapshot(module)
        self._trainable: frozenset[str] = frozenset()
        self._states = GroupStates(
            self._sizes,
            Partitioning(
                deepspeed_options.zero_stage, options.precision, dist.get_rank(), self._world
            ),
        )
        self._loss_scale: dict[str, float] = {}  # of the engine that was taken down last
        self._engine: Any = None
        self._inner: GroupAdamW | None = None
        self._universe: frozenset[str] = frozenset(g.layer_group for g in self._groups)

    def limit_universe(self, groups: Iterable[str]) -> None:
        """Tell an in-place engine which layer groups can ever train; the others get no state."""
        self._universe = frozenset(groups)

    def set_trainable(self, groups: Iterable[str]) -> PhaseReport:
        """Train exactly these layer groups from the next step on; see `Engine.set_trainable`."""
        began = time.monotonic()
        self._prefix.bring_back()
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
        self._modes.apply(wanted, weight=self._weights.whole)
        return self._report(how, seconds=time.monotonic() - began)

    def _rebuild(self, held: frozenset[str], *, wanted: frozenset[str]) -> None:
        self._take_down()
        groups = [g for g in self._groups if g.layer_group in held]
        parameters = self._weights.parameters()
        # DeepSpeed leaves out what needs no gradient when it builds its groups.
        self._set_requires_grad(held)
        self._inner = GroupAdamW(
            [
                {
                    "params": [parameters[n] for n in g.parameters],
                    "lr": g.lr,
                    "weight_decay": g.weight_decay,
                    "penalty": g.penalty,
                    "anchors": self._anchors.get(g.name, []),
                    # Some of DeepSpeed's wrappers run a step without gradients when built.
                    "active": False,
                }
                for g in groups
            ],
            betas=self.options.betas,
            eps=self.options.eps,
        )
        elements = sum(n for g in groups for _, n in self._sizes[g.name])
        config = build_ds_config(self.options, deepspeed=self._ds, trainable_elements=elements)
        import deepspeed

        self._engine, *_ = deepspeed.initialize(
            model=self.module, optimizer=self._inner, config=config, dist_init_required=False
        )
        write_loss_scale(self._engine, precision=self.options.precision, state=self._loss_scale)
        self._buffers.restore()
        self._states.attach(self._engine, inner=self._inner, held=groups)
        self._set_requires_grad(wanted)

    def _take_down(self) -> None:
        """Park the state of the engine's groups and leave the module as it was before."""
        if self._engine is None:
            if self._ds.zero_stage == 3:
                config = build_ds_config(self.options, deepspeed=self._ds, trainable_elements=0)
                self._weights.partition(config)
                self._snapshot = ModuleSnapshot(self.module)
            return
        self._states.detach()
        self._loss_scale = read_loss_scale(self._engine, precision=self.options.precision)
        if stage3 := self._ds.zero_stage == 3:
            self._engine.optimizer._partition_all_parameters()
            self._engine.empty_partition_cache()
        self._engine.destroy()
        self._engine = None
        self._inner = None
        self._snapshot.restore(fresh_parameters=not stage3)
        self._weights.refresh()
        collect_garbage()

    def _set_requires_grad(self, groups: frozenset[str]) -> None:
        parameters = self._weights.parameters()
        for group in self._groups:
            for name in group.parameters:
                parameters[name].requires_grad_(group.layer_group in groups)

    def _report(self, switch: Switch, *, seconds: float) -> PhaseReport:
        """Return what the change did, read from the parameters and the optimizer's tensors."""
        numel = {n: size for sizes in self._sizes.values() for n, size in sizes}
        needs_grad = {n for n, p in self._weights.parameters().items() if p.requires_grad}
        trainable = sum(numel[n] for n in needs_grad)
        return PhaseReport(
            switch=switch,
            switch_s=seconds,
            trainable_params=trainable,
            frozen_params=sum(numel.values()) - trainable,
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
    ) -> StepResult:
        """Run one optimizer step; see `Engine.train_step`."""
        engine = self._engine
        self._modes.enter_train(engine.module)
        loss = torch.zeros((), dtype=torch.float32, device=engine.device)
        last = len(micro_batches) - 1
        ways = self._modes.passes.of_step(
            step,
            task=task,
            micro_batches=micro_batches,
            device=engine.device,
            in_step=self._ds.zero_stage == 3,
        )
        self._prefix.settle(needed=needs_prefix(ways))
        for position, (batch, way) in enumerate(zip(micro_batches, ways, strict=True)):
            engine.set_gradient_accumulation_boundary(position == last)
            torch.manual_seed(micro_batch_seed(self.options.seed, step=step, index=batch.index))
            loss_sum, _ = self._run(task, batch, way)
            # DeepSpeed averages over ranks; the loss is a mean over the global batch.
            share = loss_sum * (batch.loss_weight / global_count)
            engine.backward(share * self._world, scale_wrt_gas=False)
            loss += share.detach()
        # Every rank must know before any updates.
        (total,) = all_reduce_sum([float(loss)])
        refused = loss_problem(total, limit=loss_limit)
        norm = self._clip_whole_gradients()
        refused = refused or gradient_problem(norm)
        self._activate(task, learning_rates if refused is None else {})
        engine.step()
        if self._ds.zero_stage == 3 and engine.optimizer.grad_partitions_flat_buffer is not None:
            # A head outside this step's task would find its last gradient here again.
            engine.optimizer.grad_partitions_flat_buffer.zero_()
        if norm is None and not self._skipped():
            norm = engine.get_global_grad_norm()
            # A gradient too large for fp16 is no fault: DeepSpeed lowers its scale and goes on.
            if not engine.was_step_applied() and self.options.precision != "fp16":
                refused = refused or gradient_problem(math.nan)
        norm = None if norm is None else float(norm)
        counts = prefix_counts(ways, parked_bytes=self._prefix.parked_bytes)
        return StepResult(loss, norm, refused, prefix=counts)

    def _skipped(self) -> bool:
        """Return whether fp16 gradients overflowed: the step moved nothing but the loss scale."""
        # Asked for its norm then, DeepSpeed answers with the one of an earlier step.
        return self.options.precision == "fp16" and bool(self._engine.optimizer.overflow)

    def _run(
        self, task: str, batch: MicroBatchLike, way: TrunkPass | None = None
    ) -> tuple[Tensor, Any]:
        device = self._engine.device
        inputs, targets = on_device(batch.inputs, device), on_device(batch.targets, device)
        return self._engine(task, inputs, targets, *(() if way is None else (way,)))

    def _activate(self, task: str, learning_rates: Mapping[str, float]) -> None:
        assert self._inner is not None
        for group, settings in zip(self._states.held, self._inner.param_groups, strict=True):
            rate = learning_rates.get(group.layer_group)  # none: the update is left out
            settings["lr"] = rate or 0.0
            trains = group.layer_group in self._trainable and task in group.tasks
            settings["active"] = trains and rate is not None

    def _clip_whole_gradients(self) -> float | None:
        if not clips_itself(self.options, self._ds):
            return None
        parameters = [p for p in self._weights.parameters().values() if p.grad is not None]
        limit = self.options.max_grad_norm or float("inf")
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))

    @torch.no_grad()
    def eval_forward(self, task: str, micro_batch: MicroBatchLike) -> tuple[Tensor, Any]:
        """Return summed loss and outputs without gradients, dropout off."""
        self._prefix.bring_back()
        self._engine.eval()
        self._modes.passes.none()
        return self._run(task, micro_batch)

    def moment_norms(self) -> dict[str, float]:
        """Return the L2 norm of Adam's first moment by layer group that trains."""
        squares = self._states.moment_squares(self._trainable)
        replicas = self._world if self._ds.zero_stage == 0 else 1
        sums = all_reduce_sum(list(squares.values()))
        return {n: (total / replicas) ** 0.5 for n, total in zip(squares, sums, strict=True)}

    def state(self) -> EngineState:
        """Return this rank's share of weights, masters, moments and step counts, as views."""
        self._prefix.bring_back()
        slices, steps = self._states.export()
        slices = [*self._weights.slices(), *slices]
        scale = read_loss_scale(self._engine, precision=self.options.precision)
        return EngineState(slices, steps, tuple(sorted(self._trainable)), scale)

    @torch.no_grad()
    def load_state(self, source: StateSource) -> None:
        """Take over saved state; the phase that it was saved in, or another, must be set."""
        self._prefix.bring_back()
        self._weights.load(source)
        self._states.load(source)
        self._states.settle(self._trainable)
        self._modes.apply(self._trainable, weight=self._weights.whole)
        write_loss_scale(self._engine, precision=self.options.precision, state=source.loss_scale)

    def full_weights(self) -> dict[str, Tensor]:
        """Return whole parameters by name on the host: on rank 0, elsewhere an empty dict."""
        self._prefix.bring_back()
        return self._weights.gather()

    def close(self) -> None:
        """Free weights and optimizer state; neither the engine nor its module is of use then.

        Letting go of the object is not enough: DeepSpeed's hooks and attributes keep engine and
        parameters alive through references that no collection sees (0.2 GiB for MiniLM).
        """
        self._prefix.bring_back()
        if self._engine is not None:
            self._take_down()
        self._states.clear()
        free_weights(self.module)
        include_in_collection()
