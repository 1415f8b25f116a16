"""Random phase schedules under ZeRO 0-3 on 1, 2 and 4 ranks, against references in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_ft.engine.base import EngineOptions, Switch
from tests.helpers.phases import (
    ALL,
    Schedule,
    bitwise_equal,
    largest_difference,
    make_deepspeed,
    make_reference,
    run,
)
from tests.helpers.run_distributed import run_distributed
from tests.helpers.same_order import SameOrder, add_ranks_in_order

HEADS = ("head.a", "head.b")
STEPS = range(50)
MICRO_BATCHES = 8  # of the global batch: 8, 4 or 2 accumulated on each rank
# Off, and below the norm of most gradients of the tiny model (0.5 to 5).
CLIPPING = st.sampled_from([0.0, 0.5])


@dataclass(frozen=True)
class Case:
    """One run: what trains when, and how."""

    stage: int
    schedule: Schedule
    switch: Switch
    max_grad_norm: float
    lr: float


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Draw a start and four real phase changes in 50 steps to any subsets that hold the heads."""
    steps = [0, *sorted(draw(st.sets(st.integers(1, 49), min_size=4, max_size=4)))]
    # Something that each task's loss reaches must train: build refuses other schedules.
    subset = st.sets(st.sampled_from(ALL)).map(lambda s: s | set(HEADS))
    masks = [tuple(n for n in ALL if n in draw(subset)) for _ in steps]
    assume(all(one != other for one, other in pairwise(masks)))
    return dict(zip(steps, masks, strict=True))


def cases(*, stage: st.SearchStrategy[int], lr: float) -> st.SearchStrategy[Case]:
    """Draw a run; in place and rebuilding, clipped or not."""
    return st.builds(
        Case,
        stage=stage,
        schedule=schedules(),
        switch=st.sampled_from(["rebuild", "in_place"]),
        max_grad_norm=CLIPPING,
        lr=st.just(lr),
    )


def of_every_stage(*, lr: float) -> st.SearchStrategy[tuple[Case, ...]]:
    """Draw a run of each stage, each with a schedule of its own."""
    return st.tuples(*(cases(stage=st.just(stage), lr=lr) for stage in range(4)))


def plain_weights(case: Case) -> dict[str, Tensor]:
    """Return the weights that plain torch in one process comes to."""
    engine = make_reference(EngineOptions(max_grad_norm=case.max_grad_norm))
    run(engine, case.schedule, steps=STEPS, micro_batches=MICRO_BATCHES, lr=case.lr)
    return engine.full_weights()


def same_order_weights(case: Case) -> dict[str, Tensor]:
    """Return the weights of one process that adds as this group's ranks do."""
    reference = SameOrder(
        stage=case.stage,
        world_size=dist.get_world_size(),
        max_grad_norm=case.max_grad_norm,
        lr=case.lr,
    )
    return reference.run(case.schedule, steps=STEPS, micro_batches=MICRO_BATCHES)


def _check(drawn: Sequence[Case], plain: Sequence[Mapping[str, Tensor]] = ()) -> None:
    """Compare the runs with the reference of the same order and, within 1e-5, with the plain one.

    One fork of the ranks serves all of them.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if world > 2:
        add_ranks_in_order()
    for place, case in enumerate(drawn):
        engine = make_deepspeed(
            EngineOptions(max_grad_norm=case.max_grad_norm),
            zero_stage=case.stage,
            switch=case.switch,
            accumulation=MICRO_BATCHES // world,
        )
        run(
            engine, case.schedule, steps=STEPS, micro_batches=MICRO_BATCHES, share=(rank, world),
            lr=case.lr,
        )  # fmt: skip
        if case.stage < 3:  # in stage 3 nobody holds whole parameters to compare
            for name, parameter in engine.module.named_parameters():
                other = parameter.detach().clone()
                dist.broadcast(other, src=0)
                assert torch.equal(parameter, other), (case, name, "differs between ranks")
        weights = engine.full_weights()
        if rank == 0:
            assert bitwise_equal(weights, same_order_weights(case)), case
            if plain:
                assert largest_difference(weights, plain[place]) <= 1e-5, case


# The seed is fixed because the bound is not certain: where a gradient cancels to about AdamW's eps
# (1e-8) the order of the additions decides the size of a first update. Measured over 101 pairs of
# orders: all within 1.2e-6 at this learning rate, 3 beyond 1e-5 at 1e-2. That nothing but the
# order is at work is what the bits say: here, and below for schedules that are drawn anew.
@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "rounds"), [(1, 1), (2, 2), (4, 1)])
def test_random_schedules_follow_the_reference(world_size: int, rounds: int) -> None:
    @settings(max_examples=1, deadline=None, derandomize=True)
    @given(drawn=st.tuples(*(of_every_stage(lr=1e-3) for _ in range(rounds))))
    def check(drawn: tuple[tuple[Case, ...], ...]) -> None:
        flat = [case for of_round in drawn for case in of_round]
        plain = [plain_weights(case) for case in flat]
        run_distributed(_check, flat, plain, world_size=world_size)

    check()


@pytest.mark.slow
@settings(max_examples=1, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize(("world_size", "count"), [(1, 3), (2, 3), (4, 2)])
def test_added_in_the_same_order_nothing_differs_by_a_bit(
    world_size: int, count: int, data: Any
) -> None:
    one = cases(stage=st.integers(0, 3), lr=1e-2)
    drawn = data.draw(st.lists(one, min_size=count, max_size=count))
    run_distributed(_check, drawn, world_size=world_size)
