"""What a phase change costs: memory, traffic, and a kill in the middle of it."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dist_ft.engine.base import EngineOptions
from dist_ft.recipe import load_recipe
from dist_ft.train import build
from tests.helpers.phases import ALL, largest_difference, make_deepspeed, run
from tests.helpers.phases import make_reference as reference_engine
from tests.helpers.run_distributed import run_distributed
from tests.helpers.same_order import SameOrder, add_ranks_in_order
from tests.helpers.tiny import TinyModel
from tests.helpers.tiny_run import state_hash, train, write_recipe

HEADS = ("head.a", "head.b")
TOP = ("block.3", *HEADS)


def _share() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


@st.composite
def schedules(draw: st.DrawFn) -> dict[int, tuple[str, ...]]:
    """Draw a start and four real phase changes in 50 steps to any subsets that hold the heads."""
    steps = [0, *sorted(draw(st.sets(st.integers(1, 49), min_size=4, max_size=4)))]
    # Something that each task's loss reaches must train: build refuses other schedules.
    subset = st.sets(st.sampled_from(ALL)).map(lambda s: s | set(HEADS))
    masks = [tuple(n for n in ALL if n in draw(subset)) for _ in steps]
    assume(all(one != other for one, other in pairwise(masks)))
    return dict(zip(steps, masks, strict=True))


def _follows(schedule: Any, switch: str, expected: Any) -> None:
    for stage in range(4):
        engine = make_deepspeed(
            EngineOptions(), zero_stage=stage, switch=switch, accumulation=8 // _share()[1]
        )
        run(engine, schedule, steps=range(50), micro_batches=8, share=_share(), lr=1e-3)
        if stage < 3:  # in stage 3 nobody holds whole parameters to compare
            for name, parameter in engine.module.named_parameters():
                other = parameter.detach().clone()
                dist.broadcast(other, src=0)
                assert torch.equal(parameter, other), (stage, name, "differs between ranks")
        weights = engine.full_weights()
        if dist.get_rank() == 0:
            assert largest_difference(weights, expected) <= 1e-5, stage


# The seed is fixed because the bound is not certain: where a gradient cancels to about AdamW's eps
# (1e-8) the order of the additions decides the size of a first update. Measured over 101 pairs of
# orders: all within 1.2e-6 at this learning rate, 3 beyond 1e-5 at 1e-2. That nothing but the
# order is at work is what the test after this one shows for schedules that are drawn anew.
@pytest.mark.slow
@settings(max_examples=1, deadline=None, derandomize=True)
@given(schedule=schedules(), switch=st.sampled_from(["rebuild", "in_place"]))
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_random_schedules_follow_the_reference(world_size: int, switch: str, schedule: Any) -> None:
    reference = reference_engine(EngineOptions())
    run(reference, schedule, steps=range(50), micro_batches=8, lr=1e-3)
    expected = reference.full_weights()
    run_distributed(_follows, schedule, switch, expected, world_size=world_size)


def _equals(stages: Any, schedule: Any, switch: str) -> None:
    rank, world = _share()
    if world > 2:
        add_ranks_in_order()
    for stage in stages:
        options = EngineOptions(max_grad_norm=0.0)
        engine = make_deepspeed(options, zero_stage=stage, switch=switch, accumulation=8 // world)
        run(engine, schedule, steps=range(50), micro_batches=8, share=_share())
        weights = engine.full_weights()
        if rank == 0:
            reference = SameOrder(stage=stage, world_size=world)
            expected = reference.run(schedule, steps=range(50), micro_batches=8)
            assert largest_difference(weights, expected) == 0.0, stage


@pytest.mark.slow
@settings(max_examples=1, deadline=None)
@given(
    schedule=schedules(),
    switch=st.sampled_from(["rebuild", "in_place"]),
    one=st.sampled_from(range(4)),
)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_added_in_the_same_order_nothing_differs_by_a_bit(
    world_size: int, one: int, switch: str, schedule: Any
) -> None:
    # Four ranks on few cores are slow: one stage of them, another in each run.
    stages = range(4) if world_size < 4 else [one]
    run_distributed(_equals, stages, schedule, switch, world_size=world_size)


def _count_bytes(stage: int) -> None:
    engine = make_deepspeed(EngineOptions(), zero_stage=stage)
    width = sum(p.numel() for p in TinyModel().parameters())
    sent: list[int] = []
    for name in ("all_reduce", "reduce_scatter_tensor", "reduce", "reduce_scatter_single"):
        original = getattr(dist, name, None)
        if original is not None:
            setattr(dist, name, _counting(original, name, sent))
    shares: dict[str, float] = {}
    for label, groups in (("all", ALL), ("top", TOP), ("all again", ALL)):
        report = engine.set_trainable(groups)
        sent.clear()
        for step in range(2):  # both heads
            run(engine, {}, steps=range(step, step + 1), micro_batches=2, share=_share())
        # Norms and flags are scalars; gradients are everything else.
        shares[label] = sum(n for n in sent if n > 64) / 2 / 4 / width
        expected = report.trainable_params / width
        # Padding to a multiple of four elements per parameter group weighs in a tiny model.
        assert abs(shares[label] - expected) <= 0.05 * expected + 0.01, (stage, label, shares)


def _counting(original: Any, name: str, sent: list[int]) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        first = kwargs.get("input", kwargs.get("tensor"))
        position = 1 if name.startswith("reduce_scatter") else 0
        tensor = args[position] if first is None else first
        sent.append(tensor.numel() * tensor.element_size())
        return original(*args, **kwargs)

    return counted


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradient_bytes_on_the_wire_follow_what_trains(stage: int) -> None:
    run_distributed(_count_bytes, stage)


# From <malloc.h>: one arena, and a mapping of its own for every buffer of 64 KiB and more, which
# goes back to the system when it is freed. As glibc tunes itself, its pages wander by 12 %.
M_ARENA_MAX, M_MMAP_THRESHOLD = -8, -3


def _tensor_bytes() -> int:
    """Return the bytes of all storages that some tensor of the process refers to."""
    gc.unfreeze()  # frozen objects are not listed
    gc.collect()
    storages = [o.untyped_storage() for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _many_changes(variants: Any) -> None:
    libc = ctypes.CDLL(None)
    assert libc.mallopt(M_ARENA_MAX, 1)
    assert libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    process = psutil.Process()
    for stage, switch in variants:
        before = _tensor_bytes()
        engine = make_deepspeed(EngineOptions(), zero_stage=stage, switch=switch, width=256)
        tensors: list[int] = []
        resident: list[int] = []
        for change in range(50):
            engine.set_trainable(ALL if change % 2 else TOP)
            steps = range(change, change + 1)
            run(engine, {}, steps=steps, micro_batches=2, share=_share(), width=256)
            tensors.append(_tensor_bytes() if change in (10, 11, 48, 49) else 0)
            resident.append(process.memory_info().rss)
        for early, late in ((10, 48), (11, 49)):  # the top alone, and everything
            assert tensors[late] <= 1.001 * tensors[early], (stage, switch, tensors)
            assert resident[late] <= 1.02 * resident[early], (stage, switch, resident)
        engine.close()
        assert _tensor_bytes() <= before + 2**16, (stage, switch, before)


@pytest.mark.slow
def test_memory_does_not_grow_over_fifty_changes() -> None:
    variants = [(0, "rebuild"), (1, "rebuild"), (2, "rebuild"), (3, "rebuild"), (2, "in_place")]
    run_distributed(_many_changes, variants, start_method="spawn", world_size=1)


def _killed(path: Path, stage: int, change: int) -> None:
    import deepspeed

    recipe = load_recipe(path, overrides=["name=killed", f"engine.zero_stage={stage}"])
    if os.environ["RANK"] == "1":
        original, calls = deepspeed.initialize, []

        def dies(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == change:  # the old engine is gone, the new one does not exist
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        deepspeed.initialize = dies
    build.train(recipe, resume=False)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_kill_during_a_phase_change_loses_nothing(stage: int, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, checkpoint={"every": "3step"})
    train(recipe, ["name=straight", f"engine.zero_stage={stage}"])
    with pytest.raises(Exception, match=r"SIGKILL|Connection|closed by peer|terminated"):
        run_distributed(_killed, recipe, stage, 3)
    train(recipe, ["name=killed", f"engine.zero_stage={stage}"], resume=True)
    assert state_hash(tmp_path / "runs/killed") == state_hash(tmp_path / "runs/straight")
