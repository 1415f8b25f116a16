import itertools
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft.data.loader import (
    BatchPlan,
    LengthPlan,
    MicroBatch,
    StepBatch,
    StepLoader,
    eval_batches,
)
from dist_ft.data.sampling import RoundRobin
from dist_ft.data.shards import ShardedDataset
from tests.helpers.datasets import SPEC, make_dataset

SIZES = {"small": 5, "middle": 23, "large": 64}


@pytest.fixture(scope="module")
def datasets() -> Iterator[dict[str, ShardedDataset]]:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        yield {
            name: make_dataset(Path(folder) / name, lengths=rng.integers(1, 40, rows).tolist())
            for name, rows in SIZES.items()
        }


def make_loader(
    datasets: dict[str, ShardedDataset],
    *,
    size: int = 12,
    micro: int = 3,
    rank: int = 0,
    world_size: int = 1,
    layout: LengthPlan | None = None,
) -> StepLoader:
    return StepLoader(
        datasets,
        specs=dict.fromkeys(datasets, SPEC),
        plan=BatchPlan(size, micro, seed=7, rank=rank, world_size=world_size, layout=layout),
        mixture=RoundRobin(len(datasets)),
    )


def same(one: MicroBatch, other: MicroBatch) -> bool:
    return (
        one.rows.tolist() == other.rows.tolist()
        and one.kept == other.kept
        and all(torch.equal(one.inputs[k], other.inputs[k]) for k in one.inputs)
        and all(torch.equal(one.targets[k], other.targets[k]) for k in one.targets)
    )


@settings(max_examples=40, deadline=None)
@given(
    step=st.integers(0, 500),
    world_size=st.integers(1, 32),
    micro=st.sampled_from([1, 2, 3, 4, 6, 12]),
)
def test_step_does_not_depend_on_world_size(
    datasets: dict[str, ShardedDataset], step: int, world_size: int, micro: int
) -> None:
    (one,) = [make_loader(datasets, micro=micro).batch(step)]
    ranks = [
        make_loader(datasets, micro=micro, rank=rank, world_size=world_size).batch(step)
        for rank in range(world_size)
    ]
    assert len({len(batch.micro_batches) for batch in ranks}) == 1
    assert {(b.task, b.epoch, b.global_count, b.global_tokens) for b in ranks} == {
        (one.task, one.epoch, one.global_count, one.global_tokens)
    }
    # Dealt out in turn: micro-batch j is number j // W of rank j % W.
    dealt = list(itertools.chain(*zip(*(b.micro_batches for b in ranks), strict=True)))
    assert [m.index for m in dealt] == list(range(len(dealt)))
    real = [m for m in dealt if m.loss_weight == 1]
    assert all(same(a, b) for a, b in zip(real, one.micro_batches, strict=True))
    for filler in dealt[len(real) :]:
        assert (filler.loss_weight, filler.tokens) == (0, 0)
        assert filler.inputs["input_ids"].shape[0] == 1


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 40))
def test_every_epoch_of_every_task_has_each_row_once(
    datasets: dict[str, ShardedDataset], size: int
) -> None:
    loader = make_loader(datasets, size=size, micro=1)
    used: dict[str, list[tuple[int, int]]] = {name: [] for name in datasets}
    for step in range(3 * (3 * 64 // size + 1)):
        rows = loader.rows_of(step)
        used[rows.task].extend(zip(rows.epochs.tolist(), rows.rows.tolist(), strict=True))
    for name, pairs in used.items():
        complete = len(pairs) // SIZES[name]
        assert complete >= 3
        for epoch in range(complete):
            rows = sorted(row for e, row in pairs if e == epoch)
            assert rows == list(range(SIZES[name]))


def test_counts_tokens_and_rows(datasets: dict[str, ShardedDataset]) -> None:
    loader = make_loader(datasets)
    for step in range(6):
        batch = loader.batch(step)
        data = datasets[batch.task]
        rows = np.concatenate([m.rows for m in batch.micro_batches])
        assert batch.task == list(SIZES)[step % 3]
        assert batch.epoch == (step // 3) * 12 / len(data)
        assert batch.global_count == data.loss_counts[rows].sum()
        assert batch.global_tokens == sum(m.tokens for m in batch.micro_batches)
        for micro in batch.micro_batches:
            assert micro.targets["source_row"].tolist() == micro.rows.tolist()
            assert micro.tokens == int(micro.inputs["attention_mask"].sum())


@settings(max_examples=10, deadline=None)
@given(starts=st.lists(st.integers(0, 10**6), min_size=1, max_size=3))
def test_resume_anywhere_is_exact(datasets: dict[str, ShardedDataset], starts: list[int]) -> None:
    loader = make_loader(datasets)
    for start in starts:
        steps = loader.iterate(start)
        for step, batch in enumerate(itertools.islice(steps, 4), start=start):
            expected = loader.batch(step)
            assert batch.step == step
            assert all(
                same(a, b) for a, b in zip(batch.micro_batches, expected.micro_batches, strict=True)
            )
            assert batch.data_wait_s >= 0
        steps.close()


@settings(max_examples=12, deadline=None)
@given(
    legs=st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 32), st.sampled_from([1, 2, 3, 4, 6, 12])),
        min_size=4,
        max_size=5,
    ),
    first=st.integers(0, 300),
    layout=st.sampled_from([None, LengthPlan(), LengthPlan(packed=True)]),
)
def test_resumed_again_and_again_with_other_worlds(
    datasets: dict[str, ShardedDataset],
    legs: list[tuple[int, int, int]],
    first: int,
    layout: LengthPlan | None,
) -> None:
    whole = make_loader(datasets)
    state = json.dumps(whole.state_dict(first))
    used: list[tuple[str, list[int]]] = []
    for steps, world_size, micro in legs:
        ranks = [
            make_loader(datasets, micro=micro, rank=rank, world_size=world_size, layout=layout)
            for rank in range(world_size)
        ]
        # What the ranks of the leg before saved is all that these know.
        (start,) = {rank.check_state(json.loads(state)) for rank in ranks}
        for step in range(start, start + steps):
            batches = [rank.batch(step) for rank in ranks]
            (task,) = {batch.task for batch in batches}
            real = [m.rows for b in batches for m in b.micro_batches if m.loss_weight == 1]
            used.append((task, sorted(np.concatenate(real).tolist())))
        state = json.dumps(ranks[-1].state_dict(start + steps))
    expected = [whole.rows_of(step) for step in range(first, first + len(used))]
    assert used == [(e.task, sorted(e.rows.tolist())) for e in expected]


def prefetch_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("dist_ft-prefetch")]


def test_closing_stops_the_thread(datasets: dict[str, ShardedDataset]) -> None:
    assert prefetch_threads() == []
    steps = make_loader(datasets).iterate(0)
    next(steps)
    assert len(prefetch_threads()) == 1
    steps.close()
    assert prefetch_threads() == []
    dropped = make_loader(datasets).iterate(0)
    next(dropped)
    del dropped
    deadline = time.monotonic() + 5
    while prefetch_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert prefetch_threads() == []


def test_next_step_is_read_ahead(datasets: dict[str, ShardedDataset]) -> None:
    class Watched(StepLoader):
        built: list[int]

        def batch(self, step: int) -> StepBatch:
            result = super().batch(step)
            self.built.append(step)
            return result

    watched = Watched(
        datasets,
        specs=dict.fromkeys(datasets, SPEC),
        plan=BatchPlan(4, 2, 0),
        mixture=RoundRobin(3),
    )
    watched.built = []
    steps = watched.iterate(10)
    next(steps)
    deadline = time.monotonic() + 5
    while len(watched.built) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    steps.close()
    assert watched.built == [10, 11, 12]


def test_tensors_are_pinned_in_the_thread(
    datasets: dict[str, ShardedDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        threads.append(threading.current_thread().name)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    plain = make_loader(datasets)
    next(plain.iterate(0))
    assert not threads
    pinning = StepLoader(
        datasets,
        specs=dict.fromkeys(datasets, SPEC),
        plan=BatchPlan(12, 3, seed=7),
        mixture=RoundRobin(3),
        pin_memory=True,
    )
    pinning.batch(0)
    assert not threads
    steps = pinning.iterate(0)
    batch = next(steps)
    steps.close()
    assert len(threads) >= len(batch.micro_batches) * len({*SPEC.inputs, *SPEC.targets})
    assert all(name.startswith("dist_ft-prefetch") for name in threads)
    assert all(map(same, batch.micro_batches, plain.batch(0).micro_batches))


def test_errors_reach_the_training_thread_with_their_place(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "broken", lengths=[4] * 6)
    (shard,) = (tmp_path / "broken").glob("*.arrow")
    content = shard.read_bytes()
    # The first byte of "ü" in the name of row 3; the file keeps its size.
    place = content.index("zeile-3-ü".encode()) + len("zeile-3-")
    shard.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    data = ShardedDataset(tmp_path / "broken", verify="size")
    loader = make_loader({"broken": data}, size=6, micro=6)
    with pytest.raises(ValueError, match=f"task 'broken', step 0: rows .*{shard.name}.*row 3 of"):
        next(loader.iterate(0))
    assert prefetch_threads() == []


def test_state_is_compared(datasets: dict[str, ShardedDataset]) -> None:
    loader = make_loader(datasets)
    state = loader.state_dict(17)
    assert make_loader(datasets, micro=6, rank=2, world_size=3).check_state(state) == 17
    with pytest.raises(ValueError, match="global_batch_size: 12 -> 24"):
        make_loader(datasets, size=24).check_state(state)
    assert make_loader(datasets, size=24).check_state(state, allow_data_change=True) == 17
    fewer = {name: datasets[name] for name in ("small", "large")}
    with pytest.raises(ValueError, match=r"datasets\.middle: .* -> \(absent\)"):
        make_loader(fewer).check_state(state)
    with pytest.raises(ValueError, match="order_algorithm_version: 99 -> 1"):
        loader.check_state({**state, "order_algorithm_version": 99}, allow_data_change=True)
    with pytest.raises(ValueError, match="no step"):
        loader.check_state({"version": 1, "order_algorithm_version": 1})


@settings(max_examples=40, deadline=None)
@given(
    world_size=st.integers(1, 9),
    micro=st.integers(1, 30),
    name=st.sampled_from(sorted(SIZES)),
)
def test_evaluation_has_every_row_once(
    datasets: dict[str, ShardedDataset], world_size: int, micro: int, name: str
) -> None:
    data = datasets[name]
    ranks = [
        list(
            eval_batches(data, spec=SPEC, micro_batch_size=micro, rank=rank, world_size=world_size)
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    real = sorted(
        (m for batches in ranks for m in batches if m.loss_weight == 1), key=lambda m: m.index
    )
    rows = np.concatenate([m.rows for m in real])
    assert sorted(rows.tolist()) == list(range(len(data)))
    assert (np.diff(data.lengths[rows]) <= 0).all()
    alone = list(eval_batches(data, spec=SPEC, micro_batch_size=micro))
    assert all(same(a, b) for a, b in zip(real, alone, strict=True))


def test_bad_plans(datasets: dict[str, ShardedDataset]) -> None:
    with pytest.raises(ValueError, match="10 must be a multiple of micro_batch_size 4"):
        BatchPlan(10, 4, seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        BatchPlan(0, 1, seed=0)
    with pytest.raises(ValueError, match="rank 2 and world_size 2"):
        BatchPlan(4, 2, seed=0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="the mixture has 2 tasks"):
        StepLoader(datasets, specs={}, plan=BatchPlan(4, 2, 0), mixture=RoundRobin(2))
    with pytest.raises(ValueError, match="no collate spec"):
        StepLoader(datasets, specs={}, plan=BatchPlan(4, 2, 0), mixture=RoundRobin(3))
    with pytest.raises(ValueError, match="micro_batch_size must be at least 1"):
        eval_batches(datasets["small"], spec=SPEC, micro_batch_size=0)
