"""Messages from rank to rank: what each of them comes to own, and that nothing else moves."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_ft.engine import exchange
from dist_ft.engine.base import EngineOptions
from dist_ft.engine.ds_config import DeepSpeedOptions, build_ds_config
from dist_ft.engine.ds_gradients import OwnedGradients
from tests.helpers.phases import ALL, bitwise_equal, make_deepspeed, run
from tests.helpers.run_distributed import run_distributed
from tests.helpers.same_order import SameOrder

WORLDS = pytest.mark.parametrize("world_size", [2, 3, 4])
LARGE = 1 << 17  # from here on a vector is a message of its own
SIZES = (1, 0, 7, 255, LARGE - 1, 3, LARGE, LARGE + 5, 64, 1)
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def _drawn(rank: int, size: int, *, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + size)
    return torch.randn(size, generator=generator).to(dtype)


def _in_order(parts: list[Tensor]) -> Tensor:
    """Add in the order of the ranks, and round to the type of the parts at the end."""
    return reduce(torch.add, [p.float() for p in parts]).to(parts[0].dtype)


def _sums() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for dtype in TYPES:
        whole = [torch.cat([_drawn(r, n, dtype=dtype) for n in SIZES]) for r in range(world)]
        mine = whole[rank].clone()
        pieces = mine.split(list(SIZES))
        sums = exchange.sum_at_owners([pieces[r::world] for r in range(world)], group=None)()
        expected = [p.split(list(SIZES)) for p in whole]
        owned = range(rank, len(SIZES), world)
        for place, found in zip(owned, sums, strict=True):
            assert torch.equal(found, _in_order([e[place] for e in expected])), (dtype, place)
        assert torch.equal(mine, whole[rank]), "autograd's own memory was written to"


@WORLDS
def test_every_slice_is_summed_at_its_owner_in_the_order_of_the_ranks(world_size: int) -> None:
    run_distributed(_sums, world_size=world_size)


def _owns_nothing() -> None:
    values = torch.full((9,), float(dist.get_rank()))
    owner = dist.get_world_size() - 1
    slices = [[values] if r == owner else [] for r in range(owner + 1)]
    sums = exchange.sum_at_owners(slices, group=None)()
    expected = [[float(sum(range(owner + 1)))] * 9] if dist.get_rank() == owner else []
    assert [s.tolist() for s in sums] == expected


@WORLDS
def test_a_rank_may_own_nothing_of_a_bucket(world_size: int) -> None:
    run_distributed(_owns_nothing, world_size=world_size)


def _gathers() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for dtype in TYPES:
        expected = [torch.cat([_drawn(r, n, dtype=dtype) for r in range(world)]) for n in SIZES]
        for at_once in (SIZES, SIZES[3:4], SIZES[7:8]):
            vectors: list[Tensor] = []
            for size in at_once:
                vectors.append(torch.full((world * size,), -1.0, dtype=dtype))
                vectors[-1][rank * size : (rank + 1) * size].copy_(_drawn(rank, size, dtype=dtype))
            # More than one exchange under way, as in a step.
            begun = [vectors[:1], vectors[1:]] if vectors[1:] else [vectors]
            pending = [exchange.gather(some, group=None) for some in begun]
            for finish in pending:
                finish()
            for size, vector in zip(at_once, vectors, strict=True):
                assert torch.equal(vector, expected[SIZES.index(size)]), (dtype, size)


@WORLDS
def test_every_rank_comes_to_have_every_share(world_size: int) -> None:
    run_distributed(_gathers, world_size=world_size)


def _at_once() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for sizes in ((5,), (5, 3, 8)):
        expected = [torch.cat([_drawn(r, n, dtype=TYPES[0]) for r in range(world)]) for n in sizes]
        vectors = [torch.zeros(world * n) for n in sizes]
        shares = [v.chunk(world) for v in vectors]
        for share, size in zip(shares, sizes, strict=True):
            share[rank].copy_(_drawn(rank, size, dtype=TYPES[0]))
        exchange._gather_at_once(vectors, shares=shares, group=dist.group.WORLD)()
        for vector, right in zip(vectors, expected, strict=True):
            assert torch.equal(vector, right)


def test_a_gpus_collective_gathers_the_same() -> None:
    run_distributed(_at_once, world_size=3)


# Buckets that gradients do not fit into one by one, that take a few, and that take all.
BASES: dict[str, Mapping[str, Any]] = {
    "one bucket": {},
    "some buckets": {"zero_optimization": {"reduce_bucket_size": 300}},
    "no gradient fits": {"zero_optimization": {"reduce_bucket_size": 2, "overlap_comm": True}},
    "overlapping": {"zero_optimization": {"reduce_bucket_size": 90, "overlap_comm": True}},
}


SCHEDULE = {0: ("block.3", "head.a", "head.b"), 2: ALL}


def _weights(stage: int, *, base: Mapping[str, Any], **options: Any) -> dict[str, Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    engine = make_deepspeed(EngineOptions(**options), zero_stage=stage, accumulation=2, base=base)
    run(engine, SCHEDULE, steps=range(5), micro_batches=2 * world, share=(rank, world))
    return engine.full_weights()


def test_partitions_lie_as_their_sizes_say_whatever_a_user_sets() -> None:
    aligned = {"zero_optimization": {"parameter_alignment": True, "overlap_comm": True}}
    options = DeepSpeedOptions(2, 1, 1, base=aligned)
    config = build_ds_config(EngineOptions(), deepspeed=options, trainable_elements=9)
    assert "parameter_alignment" not in config["zero_optimization"]
    assert config["zero_optimization"]["overlap_comm"]


def test_no_setting_lets_an_infinite_gradient_through() -> None:
    options = DeepSpeedOptions(2, 1, 1, base={"bf16": {"check_grad_overflow": False}})
    config = build_ds_config(
        EngineOptions(precision="bf16"), deepspeed=options, trainable_elements=9
    )
    assert config["bf16"] == {"check_grad_overflow": True, "enabled": True}


def _like_one_process() -> None:
    world = dist.get_world_size()
    for stage in (1, 2):
        reference = SameOrder(stage=stage, world_size=world)
        expected = reference.run(SCHEDULE, steps=range(5), micro_batches=2 * world)
        for name, base in BASES.items():
            weights = _weights(stage, base=base, max_grad_norm=0.0)
            if dist.get_rank() == 0:
                assert bitwise_equal(weights, expected), (stage, name)


@WORLDS
def test_in_every_bucket_size_the_sums_are_those_of_one_process(world_size: int) -> None:
    run_distributed(_like_one_process, world_size=world_size)


def _like_all_reduce() -> None:
    fp32 = {"communication_data_type": "fp32"}
    kept = {**fp32, "data_types": {"grad_accum_dtype": "fp32"}}
    bases = [(stage, base) for stage in (1, 2) for base in (*BASES.values(), fp32)]
    for stage, base in (*bases, (2, kept)):  # DeepSpeed has another optimizer for it in stage 1
        weights = _weights(stage, base=base, precision="bf16")
        with mock.patch.object(OwnedGradients, "of", return_value=None):
            expected = _weights(stage, base=base, precision="bf16")
        if dist.get_rank() == 0:
            assert bitwise_equal(weights, expected), (stage, base)


def test_on_two_ranks_the_bits_are_those_of_an_all_reduce() -> None:
    run_distributed(_like_all_reduce)


def _abandoned() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.distributed_c10d._get_default_group()
    for number in range(10):
        vector = torch.full((world * 50_000,), float(rank))
        begun = exchange.gather([vector], group=group)
        del begun, vector
        value = torch.full((100_000,), float(number if rank == 0 else -1))
        dist.broadcast(value, src=0)
        assert (value == number).all()
        vector = torch.full((world * 4,), float(rank))
        exchange.gather([vector], group=group)()
        assert vector.tolist() == [float(r) for r in range(world) for _ in range(4)]


@pytest.mark.timeout(60)
def test_an_exchange_that_nobody_waits_for_holds_up_no_other() -> None:
    run_distributed(_abandoned)
