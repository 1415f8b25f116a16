"""dist_ft's DeepSpeed engine in both of its ways to change phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch import Tensor

from benchmarks.freezing import tiny
from benchmarks.freezing.deepspeed_raw import full_weights, numpy_draws, own_seed
from benchmarks.freezing.outcome import Case, Recorder
from benchmarks.freezing.tiny import Schedule, TinyTransformer
from dist_ft.engine.base import EngineOptions, Precision, Switch
from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
from dist_ft.engine.ds_config import DeepSpeedOptions
from dist_ft.freezing.schedule import BlockDraw, LayerOrder
from dist_ft.optim.param_groups import ParamGroup
from dist_ft.train.agreement import DisagreementError, StepPlan, agree

SWITCHES: tuple[Switch, ...] = get_args(Switch)
DRAW = BlockDraw(
    order=LayerOrder(
        bottom=("embeddings",),
        blocks=tuple(f"block.{i}" for i in range(tiny.BLOCKS)),
        top=(),
        heads=("head.a",),
    ),
    blocks=1,
    every=tiny.BLOCK_PERIOD,
    kind="random",
    always=("embeddings", "head.a"),
    seed=0,
)


@dataclass(frozen=True)
class _MicroBatch:
    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    index: int
    rows: npt.NDArray[np.int64] = field(default_factory=lambda: np.arange(0))
    loss_weight: float = 1.0
    distinct: bool = True
    variants: None = None


def param_groups(model: TinyTransformer, *, tasks: Sequence[str]) -> list[ParamGroup]:
    """Return one optimizer group per layer group, all with the same rates."""
    members: dict[str, list[str]] = {group: [] for group in tiny.groups(tasks)}
    for name, _ in model.named_parameters():
        members[tiny.group_of(name)].append(name)
    return [
        ParamGroup(
            name=group,
            layer_group=group,
            parameters=tuple(names),
            weight_decay=tiny.WEIGHT_DECAY,
            lr=tiny.LR,
            tasks=frozenset(t for t in tasks if not group.startswith("head.") or group[5:] == t),
        )
        for group, names in members.items()
    ]


def run(
    recorder: Recorder,
    *,
    schedule: Schedule,
    tasks: tuple[str, ...],
    zero_stage: int,
    precision: Precision,
    switch: Switch,
) -> None:
    """Run a schedule through the engine."""
    model = TinyTransformer(tasks=tasks)
    engine = DeepSpeedEngine(
        model,
        param_groups=param_groups(model, tasks=tasks),
        options=EngineOptions(precision=precision, max_grad_norm=0.0),
        deepspeed_options=DeepSpeedOptions(
            zero_stage=zero_stage,
            micro_batch_size=tiny.ROWS_PER_RANK,
            gradient_accumulation_steps=1,
        ),
        switch=switch,
    )
    rank, world = dist.get_rank(), dist.get_world_size()
    first = 0
    for span in schedule:
        engine.set_trainable(span.trainable)
        if not recorder.snapshots:
            recorder.snapshots.append(full_weights(engine.module, zero_stage=zero_stage))
        for step in range(first, first + span.steps):
            engine.train_step(
                step,
                task=span.tasks[(step - first) % len(span.tasks)],
                micro_batches=[_MicroBatch(*tiny.rank_batch(step, rank=rank), index=rank)],
                global_count=tiny.ROWS_PER_RANK * world,
                learning_rates=dict.fromkeys(tiny.groups(tasks), tiny.LR),
            )
        first += span.steps
        recorder.snapshots.append(full_weights(engine.module, zero_stage=zero_stage))


def block_draws() -> list[int]:
    """Return the blocks that dist_ft's `random_block` policy draws, the same on every rank."""
    drawn = [DRAW.trainable(period) for period in range(tiny.BLOCK_PERIODS)]
    return [int(name[6:]) for names in drawn for name in names if name.startswith("block.")]


def run_planted(recorder: Recorder) -> None:
    """Give the ranks different masks and record what the training loop's check says of them."""
    rank = dist.get_rank()
    draws = numpy_draws(own_seed(rank))
    masks = [span.trainable for span in tiny.block_schedule(draws)]
    before: tuple[str, ...] = ()
    try:
        for period, mask in enumerate(masks):
            step = period * tiny.BLOCK_PERIOD
            agree(StepPlan(step, "a", 1, period, mask, before), stop=0)
            before = mask
    except DisagreementError as error:
        recorder.note = f"{type(error).__name__}: {error}"


def schedule_cases(precisions: tuple[Precision, ...]) -> list[Case]:
    """Return dist_ft on the schedule that thaws and freezes again."""
    return [
        _case(tiny.THAW_AND_FREEZE, ("a",), zero_stage=stage, precision=precision, switch=switch)
        for switch in SWITCHES
        for precision in precisions
        for stage in range(4)
    ]


def block_cases(*, quick: bool) -> list[Case]:
    """Return dist_ft on random blocks, and with masks planted to differ."""
    schedule = tiny.block_schedule(block_draws())
    labels = {"system": "dist_ft, masks made to differ", "setting": "any", "precision": "fp32"}
    return [
        *(
            _case(schedule, ("a",), zero_stage=stage, precision="fp32", switch="in_place")
            for stage in ((0, 2) if quick else (0, 1, 2, 3))
        ),
        Case(labels, run_planted),
    ]


def head_cases(*, quick: bool) -> list[Case]:
    """Return dist_ft with two heads of which one runs in a step."""
    return [
        _case(tiny.HEADS, tiny.TASKS, zero_stage=stage, precision="fp32", switch=switch)
        for switch in (SWITCHES[1:] if quick else SWITCHES)
        for stage in range(4)
    ]


def _case(
    schedule: Schedule,
    tasks: tuple[str, ...],
    *,
    zero_stage: int,
    precision: Precision,
    switch: Switch,
) -> Case:
    labels = {
        "system": f"dist_ft, {switch}",
        "setting": f"ZeRO-{zero_stage}",
        "precision": precision,
    }
    call = partial(
        run,
        schedule=schedule,
        tasks=tasks,
        zero_stage=zero_stage,
        precision=precision,
        switch=switch,
    )
    return Case(labels, call)
