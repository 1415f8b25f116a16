"""Phase changes under ZeRO 0-3 against the plain-torch reference."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_ft.engine.base import EngineOptions
from tests.helpers.phases import (
    ALL,
    bitwise_equal,
    clone,
    largest_difference,
    make_deepspeed,
    make_reference,
    run,
)
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny import TASKS, TinyModel, global_batch, learning_rates, param_groups

HEADS = ("head.a", "head.b")
GRADUAL = {
    0: HEADS,
    5: ("block.3", *HEADS),
    10: ("block.2", "block.3", *HEADS),
    15: ("block.1", "block.2", "block.3", *HEADS),
    20: ALL,
}
# Not a suffix, freezing and unfreezing, a head among what changes.
ANY_SUBSET = {
    0: ("block.3", *HEADS),
    4: ("block.1", "head.a"),
    8: ALL,
    13: ("embeddings", "block.2", *HEADS),
    18: ("block.3", "head.b"),
    24: ALL,
}
# fp32 sums over 2 ranks in another order than one process does; AdamW's division by sqrt(v)
# carries the last bit into the update. The bound is the issue's; measured differences are 2e-7.
FP32_TOLERANCE = 1e-5


# Every test forks its ranks once, for all that it compares.
SCHEDULES = {"gradual": GRADUAL, "any subset": ANY_SUBSET}


@functools.cache
def _expected(name: str) -> dict[str, Tensor]:
    reference = make_reference(EngineOptions(max_grad_norm=1.0))
    run(reference, SCHEDULES[name], steps=range(30), micro_batches=4)
    return reference.full_weights()


def _compare(stage: int, cases: Any, accumulation: int, expected: Any) -> None:
    world = dist.get_world_size()
    for name, switch in cases:
        engine = make_deepspeed(
            EngineOptions(max_grad_norm=1.0),
            zero_stage=stage,
            switch=switch,
            accumulation=accumulation,
        )
        run(
            engine,
            SCHEDULES[name],
            steps=range(30),
            micro_batches=4,
            share=(dist.get_rank(), world),
        )
        weights = engine.full_weights()
        if dist.get_rank() == 0:
            difference = largest_difference(weights, expected[name])
            assert difference <= FP32_TOLERANCE, (stage, name, switch, difference)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_follows_the_reference(stage: int) -> None:
    cases = list(itertools.product(SCHEDULES, ("rebuild", "in_place")))
    run_distributed(_compare, stage, cases, 2, {name: _expected(name) for name in SCHEDULES})


def test_four_ranks_follow_the_reference() -> None:
    name = "any subset"
    run_distributed(_compare, 2, [(name, "rebuild")], 1, {name: _expected(name)}, world_size=4)


def _frozen_stay(stage: int) -> None:
    for precision, clip in itertools.product(("fp32", "bf16"), (0.0, 0.5)):
        for accumulation in (1, 4):
            _check_frozen(stage, precision, accumulation, clip, "rebuild")
        _check_frozen(stage, precision, 4 if clip else 1, clip, "in_place")


def _check_frozen(stage: int, precision: Any, accumulation: int, clip: float, switch: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    options = EngineOptions(max_grad_norm=clip, precision=precision)
    engine = make_deepspeed(options, zero_stage=stage, switch=switch, accumulation=accumulation)
    count = world * accumulation
    # Everything trains first, so that the groups have momentum that could move them later.
    run(engine, {0: ALL}, steps=range(5), micro_batches=count, share=(rank, world))
    before = clone(engine.full_weights())
    thawed = ("block.2", "block.3", *HEADS)
    engine.set_trainable(thawed)
    run(engine, {}, steps=range(5, 55), micro_batches=count, share=(rank, world))
    after = engine.full_weights()
    if rank:
        return
    frozen = [n for n in before if n.startswith(("embeddings", "blocks.0", "blocks.1"))]
    assert frozen
    for name in before:
        same = torch.equal(before[name], after[name])
        assert same == (name in frozen), (stage, precision, accumulation, clip, switch, name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_frozen_layers_do_not_move_by_a_bit(stage: int) -> None:
    run_distributed(_frozen_stay, stage)


def _inactive_head(stage: int) -> None:
    for switch in ("rebuild", "in_place"):
        _check_inactive_head(stage, switch)


def _check_inactive_head(stage: int, switch: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    engine = make_deepspeed(EngineOptions(), zero_stage=stage, switch=switch)
    run(engine, {0: ALL}, steps=range(4), micro_batches=world, share=(rank, world))
    before = clone(engine.full_weights())
    groups = param_groups(engine.module)
    for step in range(4, 24):
        batches = global_batch(step, micro_batches=world)
        engine.train_step(
            step,
            task=TASKS[0],
            micro_batches=batches[rank::world],
            global_count=sum(len(b.targets["y"]) for b in batches),
            learning_rates=learning_rates(groups, step),
        )
    after = engine.full_weights()
    if rank == 0:
        for name in before:
            assert torch.equal(before[name], after[name]) == name.startswith("heads.b"), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_head_of_another_task_does_not_move(stage: int) -> None:
    run_distributed(_inactive_head, stage)


def _no_change(stage: int) -> None:
    for precision in ("fp32", "bf16"):
        _check_no_change(stage, precision)


def _check_no_change(stage: int, precision: Any) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    options = EngineOptions(precision=precision)
    weights = []
    for rebuilds in (False, True):
        engine = make_deepspeed(options, zero_stage=stage, dropout=0.1)
        schedule = {0: ALL, **({7: (*ALL[1:],), 8: ALL} if rebuilds else {})}
        # Step 7 would train all but the embeddings; going there and back must cost nothing.
        run(engine, {0: ALL}, steps=range(7), micro_batches=world, share=(rank, world))
        if rebuilds:
            engine.set_trainable(schedule[7])
            engine.set_trainable(ALL)
        run(engine, {}, steps=range(7, 12), micro_batches=world, share=(rank, world))
        weights.append(engine.full_weights())
    if rank == 0:
        assert bitwise_equal(*weights), (stage, precision)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_rebuilding_changes_nothing_by_itself(stage: int) -> None:
    run_distributed(_no_change, stage)


def _both_ways(stage: int, precision: Any, offload: bool) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    weights = []
    for switch in ("rebuild", "in_place"):
        engine = make_deepspeed(
            EngineOptions(precision=precision), zero_stage=stage, switch=switch, offload=offload
        )
        run(engine, ANY_SUBSET, steps=range(30), micro_batches=world, share=(rank, world))
        weights.append(engine.full_weights())
    if rank:
        return
    if offload:
        # DeepSpeed sums offloaded gradient norms parameter by parameter, in another order.
        assert largest_difference(*weights) <= 1e-6
    else:
        assert bitwise_equal(*weights)


@pytest.mark.parametrize(
    ("stage", "precision", "offload"),
    [
        (0, "bf16", False),
        (2, "bf16", False),
        (3, "bf16", False),
        (2, "fp32", True),
        (3, "bf16", True),
    ],
)
def test_rebuild_and_in_place_agree_bit_for_bit(stage: int, precision: str, offload: bool) -> None:
    run_distributed(_both_ways, stage, precision, offload)


def _reset(stage: int, expected: Any) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for switch in ("rebuild", "in_place"):
        engine = make_deepspeed(EngineOptions(returning="reset"), zero_stage=stage, switch=switch)
        run(engine, ANY_SUBSET, steps=range(30), micro_batches=world, share=(rank, world))
        weights = engine.full_weights()
        if rank == 0:
            assert largest_difference(weights, expected) <= FP32_TOLERANCE, switch


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_reset_forgets_the_moments_of_groups_that_return(stage: int) -> None:
    reference = make_reference(EngineOptions(returning="reset"))
    run(reference, ANY_SUBSET, steps=range(30), micro_batches=2)
    kept = make_reference(EngineOptions(returning="keep"))
    run(kept, ANY_SUBSET, steps=range(30), micro_batches=2)
    assert largest_difference(reference.full_weights(), kept.full_weights()) > 1e-3
    run_distributed(_reset, stage, reference.full_weights())


def _bytes(stage: int) -> None:
    for precision in ("fp32", "bf16"):
        _check_bytes(stage, precision)


def _check_bytes(stage: int, precision: Any) -> None:
    engine = make_deepspeed(EngineOptions(precision=precision), zero_stage=stage, width=64)
    world = dist.get_world_size() if stage else 1
    # Two moments and a master; without ZeRO an fp32 weight is its own master.
    each = 8 if stage == 0 and precision == "fp32" else 12
    for step, groups in enumerate((ALL, ("block.3", *HEADS), ALL, HEADS, ALL)):
        report = engine.set_trainable(groups)
        expected = each * report.trainable_params / world
        padding = each * 4 * 2 * len(ALL)  # a few elements per parameter group
        assert expected <= report.optimizer_bytes <= 1.02 * expected + padding
        total = report.trainable_params + report.frozen_params
        assert total == sum(p.numel() for p in TinyModel(width=64).parameters())
        share = (dist.get_rank(), dist.get_world_size())
        run(engine, {}, steps=range(step, step + 1), micro_batches=2, share=share, width=64)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_optimizer_bytes_follow_what_trains(stage: int) -> None:
    run_distributed(_bytes, stage)
