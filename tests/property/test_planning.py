import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft.data.loader import BatchPlan, LengthPlan, MicroBatch, StepLoader
from dist_ft.data.planning import PlannedStep, deal, plan_step
from dist_ft.data.sampling import RoundRobin
from dist_ft.data.shards import ShardedDataset
from tests.helpers.datasets import SPEC, make_dataset

LENGTHS = st.lists(st.integers(1, 600), min_size=1, max_size=80)


def text_lengths(rows: int, *, seed: int = 0) -> np.ndarray:
    """Log-normal as in real text: mean 59, median 43, 99th percentile 280, at most 512 tokens."""
    rng = np.random.default_rng(seed)
    return np.clip(np.round(rng.lognormal(np.log(43), 0.8, rows)), 1, 512).astype(np.int64)


def padded(lengths: np.ndarray, planned: PlannedStep) -> np.ndarray:
    return np.array([len(m) * lengths[m].max() for m in planned.micro_batches])


def share_at_ranks(lengths: np.ndarray, planned: PlannedStep, *, world_size: int) -> float:
    """Useful tokens over the places that all ranks have until the last one is done."""
    tokens = padded(lengths, planned)
    ranks = deal(planned.costs, world_size=world_size)
    slowest = max(sum(int(tokens[n]) for n in rank if n is not None) for rank in ranks)
    return float(lengths.sum() / (world_size * slowest))


@given(lengths=LENGTHS, data=st.data())
def test_every_row_is_in_one_micro_batch(lengths: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(lengths)))
    plan = LengthPlan(
        attention_cost=data.draw(st.sampled_from([0.0, 1 / 4096, 0.5])),
        max_tokens=data.draw(st.sampled_from([None, 600, 1000, 5000])),
        multiple_of=data.draw(st.sampled_from([1, 2, 8])),
        packed=data.draw(st.booleans()),
    )
    planned = plan_step(lengths, micro_batches=count, plan=plan)
    places = np.concatenate(planned.micro_batches)
    assert sorted(places.tolist()) == list(range(len(lengths)))
    found = len(planned.micro_batches)
    assert found >= count
    assert found % plan.multiple_of == 0 or found == len(lengths)
    if plan.max_tokens is None:
        assert found < count + plan.multiple_of
    sizes = np.array(lengths)
    for members in planned.micro_batches:
        tokens = sizes[members].sum() if plan.packed else len(members) * sizes[members].max()
        assert plan.max_tokens is None or tokens <= plan.max_tokens
        assert (np.diff(sizes[members]) <= 0).all()
    again = plan_step(lengths, micro_batches=count, plan=plan)
    assert all(map(np.array_equal, planned.micro_batches, again.micro_batches))


@given(
    costs=st.lists(st.integers(0, 10**12), min_size=1, max_size=70), world_size=st.integers(1, 33)
)
def test_dealing_is_complete_and_even(costs: list[int], world_size: int) -> None:
    ranks = deal(costs, world_size=world_size)
    assert len(ranks) == world_size
    assert {len(rank) for rank in ranks} == {-(-len(costs) // world_size)}
    assert sorted(n for rank in ranks for n in rank if n is not None) == list(range(len(costs)))
    loads = [sum(costs[n] for n in rank if n is not None) for rank in ranks]
    assert max(loads) - min(loads) <= max(costs)


@pytest.mark.parametrize(("rows", "world_size", "each", "least"), [
    (256, 8, 4, 0.90),
    (256, 8, 8, 0.95),
    (1024, 8, 8, 0.94),
    (128, 2, 4, 0.80),
])  # fmt: skip
def test_useful_share_on_real_lengths(rows: int, world_size: int, each: int, least: float) -> None:
    lengths = text_lengths(40 * rows)
    assert abs(lengths.mean() - 59) < 1.5
    planned_shares, random_shares, spreads = [], [], []
    for start in range(0, len(lengths), rows):
        own = lengths[start : start + rows]
        planned = plan_step(own, micro_batches=world_size * each, plan=LengthPlan())
        planned_shares.append(share_at_ranks(own, planned, world_size=world_size))
        tokens = padded(own, planned)
        loads = [
            sum(int(tokens[n]) for n in rank if n is not None)
            for rank in deal(planned.costs, world_size=world_size)
        ]
        spreads.append(max(loads) / np.mean(loads))
        rectangle = own.reshape(world_size, each, -1)
        slowest = (rectangle.shape[2] * rectangle.max(axis=2)).sum(axis=1).max()
        random_shares.append(own.sum() / (world_size * slowest))
    assert np.mean(planned_shares) >= least
    assert np.mean(random_shares) < 0.4
    assert np.mean(spreads) < 1.06


def test_random_batches_are_what_it_is_compared_with() -> None:
    lengths = text_lengths(64 * 256).reshape(64, 8, 32)
    slowest = (32 * lengths.max(axis=2)).max(axis=1)
    assert np.mean(lengths.sum(axis=(1, 2)) / (8 * slowest)) < 0.3


def test_packed_groups_are_equal() -> None:
    lengths = text_lengths(256)
    planned = plan_step(lengths, micro_batches=32, plan=LengthPlan(packed=True, attention_cost=0))
    tokens = np.array([lengths[members].sum() for members in planned.micro_batches])
    assert tokens.max() <= max(lengths.max(), tokens.mean() * 1.03)


def test_planning_is_quick() -> None:
    lengths = text_lengths(1024)
    plan = LengthPlan()
    best = min(_seconds(lengths, plan) for _ in range(5))
    # About 3 ms on one quiet core.
    assert best < 0.05


def _seconds(lengths: np.ndarray, plan: LengthPlan) -> float:
    started = time.perf_counter()
    deal(plan_step(lengths, micro_batches=64, plan=plan).costs, world_size=8)
    return time.perf_counter() - started


def test_bad_plans() -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"attention_cost": -1}, "attention_cost must lie in"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"multiple_of": 0}, "multiple_of must be at least 1"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            LengthPlan(**options)
    with pytest.raises(ValueError, match="2 rows can't be divided into 3"):
        plan_step([1, 2], micro_batches=3, plan=LengthPlan())
    with pytest.raises(ValueError, match="a row has 9 tokens, more than max_tokens 8"):
        plan_step([1, 9], micro_batches=1, plan=LengthPlan(max_tokens=8))
    with pytest.raises(ValueError, match="world_size must be at least 1"):
        deal([1], world_size=0)


@pytest.fixture(scope="module")
def datasets() -> Iterator[dict[str, ShardedDataset]]:
    with tempfile.TemporaryDirectory() as folder:
        yield {
            name: make_dataset(Path(folder) / name, lengths=text_lengths(rows, seed=rows).tolist())
            for name, rows in (("one", 50), ("two", 131))
        }


def make_loader(
    datasets: dict[str, ShardedDataset],
    *,
    layout: LengthPlan | None,
    size: int = 24,
    micro: int = 4,
    rank: int = 0,
    world_size: int = 1,
) -> StepLoader:
    return StepLoader(
        datasets,
        specs=dict.fromkeys(datasets, SPEC),
        plan=BatchPlan(size, micro, seed=7, rank=rank, world_size=world_size, layout=layout),
        mixture=RoundRobin(len(datasets)),
    )


def same(one: MicroBatch, other: MicroBatch) -> bool:
    return one.rows.tolist() == other.rows.tolist() and all(
        torch.equal(a[name], b[name])
        for a, b in ((one.inputs, other.inputs), (one.targets, other.targets))
        for name in a
    )


@settings(max_examples=40, deadline=None)
@given(
    step=st.integers(0, 500),
    world_size=st.integers(1, 32),
    micro=st.sampled_from([1, 2, 4, 24]),
    layout=st.builds(
        LengthPlan,
        max_tokens=st.sampled_from([None, 512, 2048]),
        multiple_of=st.sampled_from([1, 4]),
        packed=st.booleans(),
    ),
)
def test_micro_batches_do_not_depend_on_world_size(
    datasets: dict[str, ShardedDataset],
    step: int,
    world_size: int,
    micro: int,
    layout: LengthPlan,
) -> None:
    one = make_loader(datasets, layout=layout, micro=micro).batch(step)
    ranks = [
        make_loader(datasets, layout=layout, micro=micro, rank=rank, world_size=world_size).batch(
            step
        )
        for rank in range(world_size)
    ]
    assert len({len(batch.micro_batches) for batch in ranks}) == 1
    found = [m for batch in ranks for m in batch.micro_batches]
    # Dropout seeds come from the number: each is used once, fillers included.
    assert len({m.index for m in found}) == len(found)
    real = {m.index: m for m in found if m.loss_weight == 1}
    assert real.keys() == {m.index for m in one.micro_batches} == set(range(len(real)))
    assert all(same(real[m.index], m) for m in one.micro_batches)
    for filler in found:
        assert filler.loss_weight == 1 or (filler.tokens == 0 and filler.index >= len(real))
    plain = make_loader(datasets, layout=None, micro=micro).batch(step)
    rows = np.concatenate([m.rows for m in real.values()])
    expected = np.concatenate([m.rows for m in plain.micro_batches])
    assert sorted(rows.tolist()) == sorted(expected.tolist())
    assert {(b.global_count, b.global_tokens) for b in ranks} == {
        (plain.global_count, plain.global_tokens)
    }


def test_a_row_over_the_budget_is_named(datasets: dict[str, ShardedDataset]) -> None:
    loader = make_loader(datasets, layout=LengthPlan(max_tokens=2))
    with pytest.raises(ValueError, match=r"task 'one', step 0: a row has .* more than max_tok"):
        loader.batch(0)


def test_module_does_not_import_torch() -> None:
    code = "import sys, dist_ft.data.planning; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
