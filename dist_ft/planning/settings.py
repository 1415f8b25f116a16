"""The plan of a recipe: every phase in its setting, and the cheapest setting that fits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dist_ft.config import Recipe
from dist_ft.planning.cost import (
    Cluster,
    Flops,
    StepTime,
    Traffic,
    flops_of,
    step_time,
    traffic_of,
)
from dist_ft.planning.memory import (
    FRAGMENTATION,
    Memory,
    Setting,
    checkpoint_bytes,
    memory_of,
)
from dist_ft.planning.phases import PlannedPhase, Schedule
from dist_ft.planning.shape import ModelShape


@dataclass(frozen=True)
class PhasePlan:
    """What one phase needs on each rank.

    Attributes:
        phase: The phase.
        trained: Parameters that train.
        memory: Bytes.
        flops: Of one micro-batch, the mean over the tasks.
        traffic: Of one step.
        time: Of one step.
    """

    phase: PlannedPhase
    trained: int
    memory: Memory
    flops: Flops
    traffic: Traffic
    time: StepTime


@dataclass(frozen=True)
class Plan:
    """A recipe on a cluster.

    Attributes:
        setting: How it is executed.
        phases: In order.
        run_s: Seconds of the whole run without evaluation, saving and phase changes.
        checkpoint_bytes: Of the largest checkpoint, over all ranks.
        usable_bytes: Of one device.
    """

    setting: Setting
    phases: tuple[PhasePlan, ...]
    run_s: float
    checkpoint_bytes: int
    usable_bytes: int

    @property
    def peak(self) -> PhasePlan:
        """The phase that needs most memory."""
        return max(self.phases, key=lambda p: p.memory.total)

    @property
    def fits(self) -> bool:
        """Whether every phase fits."""
        return self.peak.memory.total <= self.usable_bytes


def with_whole_rows(recipe: Recipe, *, world_size: int) -> Recipe:
    """Return the recipe with a budget of tokens turned into rows of the longest kind.

    A micro-batch within the budget never needs more than that many such rows do.
    """
    budget = recipe.train.micro_batch_tokens
    if budget is None:
        return recipe
    each = max(1, recipe.train.global_batch_size // world_size)
    most = min(each, recipe.train.micro_batch_size)
    longest = max(task.max_length for task in recipe.tasks)
    rows = max(1, min(most, budget // longest))
    rows = next(n for n in range(rows, 0, -1) if each % n == 0)
    train = recipe.train.model_copy(update={"micro_batch_size": rows, "micro_batch_tokens": None})
    return recipe.model_copy(update={"train": train})


def setting_of(recipe: Recipe, schedule: Schedule, *, world_size: int) -> Setting:
    """Return the setting of a recipe on so many ranks.

    Raises:
        ValueError: If the global batch can't be shared out.
    """
    micro_batches = recipe.train.global_batch_size // recipe.train.micro_batch_size
    if micro_batches % world_size:
        size = recipe.train.micro_batch_size * world_size
        raise ValueError(
            f"train.global_batch_size: {micro_batches} micro-batches of "
            f"{recipe.train.micro_batch_size} rows can't be shared equally by {world_size} ranks: "
            f"use a multiple of {size}, such as train.global_batch_size="
            f"{max(1, round(recipe.train.global_batch_size / size)) * size}"
        )
    given: dict[str, Any] = {}
    if recipe.engine.deepspeed is not None:
        given = json.loads(recipe.engine.deepspeed.read_text()).get("zero_optimization", {})
    return Setting(
        world_size=world_size,
        zero_stage=0 if recipe.engine.type == "reference" else recipe.engine.zero_stage,
        precision=recipe.engine.precision,
        micro_batch_size=recipe.train.micro_batch_size,
        accumulation=micro_batches // world_size,
        checkpointing=recipe.model.activation_checkpointing,
        offload_optimizer=recipe.engine.offload_optimizer,
        switch="in_place" if schedule.switch == "in_place" else "rebuild",
        averages=recipe.regularization.averaging is not None,
        turns=recipe.mixture.tasks_per_step,
        deepspeed={k: int(v) for k, v in given.items() if _is_whole(v)},
    )


def _is_whole(value: Any) -> bool:
    """Return whether a value of a JSON is a number without a fraction, also if written as 5e8."""
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def make_plan(shape: ModelShape, *, schedule: Schedule, setting: Setting, cluster: Cluster) -> Plan:
    """Return what every phase needs in one setting."""
    on_gpu = not cluster.hardware.name.startswith("cpu")
    phases = tuple(
        _phase_plan(shape, p, schedule=schedule, setting=setting, cluster=cluster, on_gpu=on_gpu)
        for p in schedule.phases
    )
    run_s = schedule.total_steps * sum(p.phase.share * p.time.total_s for p in phases)
    return Plan(
        setting=setting,
        phases=phases,
        run_s=run_s,
        checkpoint_bytes=checkpoint_bytes(shape, universe=schedule.universe, setting=setting),
        usable_bytes=int(cluster.hardware.memory_bytes * (1 - FRAGMENTATION)),
    )


def _phase_plan(
    shape: ModelShape,
    phase: PlannedPhase,
    *,
    schedule: Schedule,
    setting: Setting,
    cluster: Cluster,
    on_gpu: bool,
) -> PhasePlan:
    trainable = phase.trainable
    all_flops = [flops_of(shape, w, trainable=trainable, setting=setting) for w in shape.work]
    count = max(1, len(all_flops))
    return PhasePlan(
        phase=phase,
        trained=shape.numel_of(trainable),
        memory=memory_of(
            shape,
            trainable=trainable,
            universe=schedule.universe,
            setting=setting,
            before=phase.before,
            on_gpu=on_gpu,
        ),
        flops=Flops(
            sum(f.forward for f in all_flops) // count,
            sum(f.backward for f in all_flops) // count,
            sum(f.recomputed for f in all_flops) // count,
        ),
        traffic=traffic_of(shape, trainable=trainable, setting=setting),
        time=step_time(shape, trainable=trainable, setting=setting, cluster=cluster),
    )


def cheapest(
    shape: ModelShape, *, schedule: Schedule, setting: Setting, cluster: Cluster
) -> Plan | None:
    """Return the quickest plan that fits, over what changes no result but rounding; or None.

    ZeRO stage, micro-batch size (the global batch stays), recomputation and offload are varied; on
    the same cluster the quickest is the cheapest. Of plans within 2 % the one with the fewest
    changes to `setting` wins.
    """
    plans = [
        make_plan(shape, schedule=schedule, setting=s, cluster=cluster)
        for s in _variants(setting, blocks=bool(shape.checkpointable))
    ]
    fitting = [p for p in plans if p.fits]
    if not fitting:
        return None
    best = min(p.run_s for p in fitting)
    return min(
        (p for p in fitting if p.run_s <= 1.02 * best),
        key=lambda p: (len(changes(setting, p.setting)), p.run_s),
    )


def changes(old: Setting, new: Setting) -> dict[str, str]:
    """Return the recipe's keys that turn one setting into another, with their values."""
    pairs = {
        "engine.zero_stage": (old.zero_stage, new.zero_stage),
        "engine.offload_optimizer": (old.offload_optimizer, new.offload_optimizer),
        "model.activation_checkpointing": (old.checkpointing, new.checkpointing),
        "train.micro_batch_size": (old.micro_batch_size, new.micro_batch_size),
    }
    return {
        key: str(now).lower() if isinstance(now, bool) else str(now)
        for key, (before, now) in pairs.items()
        if before != now
    }


def _variants(setting: Setting, *, blocks: bool) -> Iterator[Setting]:
    rows = setting.micro_batch_size * setting.accumulation
    first = 1 if setting.precision == "fp16" else 0
    modes = {setting.checkpointing, "none", *(["non_reentrant"] if blocks else [])}
    for stage in range(first, 4):
        for mode in sorted(modes):
            for micro in (m for m in range(1, rows + 1) if rows % m == 0):
                for offload in (False, True) if stage else (False,):
                    yield replace(
                        setting,
                        zero_stage=stage,
                        checkpointing=mode,
                        micro_batch_size=micro,
                        accumulation=rows // micro,
                        offload_optimizer=offload,
                    )
