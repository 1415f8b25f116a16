"""What a phase change costs: memory, traffic, and a kill in the middle of it."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_ft.engine.base import EngineOptions
from dist_ft.recipe import load_recipe
from dist_ft.train import build
from tests.helpers.phases import ALL, bitwise_equal, largest_difference, make_deepspeed, run
from tests.helpers.phases import make_reference as reference_engine
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny import TinyModel
from tests.helpers.tiny_run import state_hash, train, write_recipe

HEADS = ("head.a", "head.b")
TOP = ("block.3", *HEADS)


def _share() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


@st.composite
def schedules(draw: st.DrawFn) -> dict[int, tuple[str, ...]]:
    """Draw a start and four phase changes in 50 steps to any subsets that hold the heads."""
    steps = [0, *sorted(draw(st.sets(st.integers(1, 49), min_size=4, max_size=4)))]
    # Something that each task's loss reaches must train: build refuses other schedules.
    subset = st.sets(st.sampled_from(ALL), min_size=1).map(lambda s: s | set(HEADS))
    return {step: tuple(n for n in ALL if n in draw(subset)) for step in steps}


def _random_schedule(stage: int, switch: str, schedule: Any, expected: Any) -> None:
    engine = make_deepspeed(EngineOptions(), zero_stage=stage, switch=switch)
    run(engine, schedule, steps=range(50), micro_batches=_share()[1], share=_share())
    mine = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    if stage < 3:  # in stage 3 nobody holds whole parameters to compare
        for name, value in mine.items():
            other = value.clone()
            dist.broadcast(other, src=0)
            assert torch.equal(value, other), (name, "differs between ranks")
    weights = engine.full_weights()
    if dist.get_rank() == 0:
        assert largest_difference(weights, expected) <= 1e-5


@pytest.mark.slow
@settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    schedule=schedules(),
    switch=st.sampled_from(["rebuild", "in_place"]),
    world_size=st.sampled_from([1, 2, 4]),
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_random_schedules_follow_the_reference(
    stage: int, switch: str, world_size: int, schedule: Any
) -> None:
    # One micro-batch per rank: two ranks then add in the reference's order. With accumulation the
    # order differs, and AdamW at this learning rate (1e-2) has been seen to make 1.6e-5 of it.
    reference = reference_engine(EngineOptions())
    run(reference, schedule, steps=range(50), micro_batches=world_size)
    expected = reference.full_weights()
    run_distributed(_random_schedule, stage, switch, schedule, expected, world_size=world_size)


def _one_rank(stage: int, expected: Any) -> None:
    engine = make_deepspeed(EngineOptions(max_grad_norm=0.0), zero_stage=stage)
    run(engine, {0: ALL}, steps=range(40), micro_batches=1)
    weights = engine.full_weights()
    if stage == 0:
        assert bitwise_equal(weights, expected)
    # A vectorised AdamW rounds the last few elements of a vector otherwise, and the flat vectors
    # of stages 1-3 end elsewhere: at most two units in the last place of a weight near 1.
    assert largest_difference(weights, expected) <= 2.4e-7


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_with_the_same_order_of_sums_only_rounding_is_left(stage: int) -> None:
    # One micro-batch on one rank and no clipping norm: nothing is summed in another order.
    reference = reference_engine(EngineOptions(max_grad_norm=0.0))
    run(reference, {0: ALL}, steps=range(40), micro_batches=1)
    run_distributed(_one_rank, stage, reference.full_weights(), world_size=1)


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


def _many_changes(stage: int, switch: str) -> None:
    options = EngineOptions()
    engine = make_deepspeed(options, zero_stage=stage, switch=switch, width=512)
    process = psutil.Process()
    resident: list[int] = []
    for change in range(50):
        engine.set_trainable(ALL if change % 2 else TOP)
        run(engine, {}, steps=range(change, change + 1), micro_batches=2, share=_share(), width=512)
        gc.collect()
        resident.append(process.memory_info().rss)
    # The allocator's pages wander by several percent; an engine's buffers kept per change, the
    # leak that was, would add a third here.
    early, late = min(resident[20:30]), min(resident[-10:])
    assert late <= 1.12 * early, (stage, resident)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "switch"),
    [(0, "rebuild"), (1, "rebuild"), (2, "rebuild"), (3, "rebuild"), (2, "in_place")],
)
def test_memory_does_not_grow_over_fifty_changes(stage: int, switch: str) -> None:
    run_distributed(_many_changes, stage, switch, start_method="spawn")


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
