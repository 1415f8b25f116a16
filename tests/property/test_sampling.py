import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.data.sampling import (
    ORDER_ALGORITHM_VERSION,
    RoundRobin,
    row_at,
    rows_between,
    step_slots,
)

# Frozen: a change of these numbers is a change of every run's order and needs a new version.
GOLDEN_VERSION = 1
GOLDEN: list[tuple[int, int, str, int, list[int]]] = [
    # (rows, seed, task, first slot, rows of the next eight slots)
    (1, 0, "a", 0, [0, 0, 0, 0, 0, 0, 0, 0]),
    (2, 0, "a", 0, [0, 1, 0, 1, 1, 0, 0, 1]),
    (7, 42, "trec", 3, [1, 5, 2, 0, 6, 4, 1, 0]),
    (1000, 0, "squad", 995, [613, 797, 961, 933, 81, 594, 27, 11]),
    (5381, 1234, "trec", 1000000, [4737, 3255, 4903, 1825, 2454, 3538, 1876, 697]),
    (200000, 7, "wnut16", 0, [105950, 106418, 65675, 130922, 645, 133425, 157958, 48454]),
    (
        1000000000,
        2147483648,
        "größe",
        5000000000000,
        [625232594, 38124265, 275234061, 920614268, 966980013, 692215810, 608720617, 931586544],
    ),
]


def test_golden_vectors() -> None:
    assert ORDER_ALGORITHM_VERSION == GOLDEN_VERSION
    assert len(GOLDEN) >= 5
    for rows, seed, task, first, expected in GOLDEN:
        found = row_at(np.arange(first, first + 8), rows=rows, seed=seed, task=task)[1]
        assert found.tolist() == expected, (rows, seed, task, first)


@given(
    rows=st.integers(1, 500),
    seed=st.integers(-5, 2**40),
    epoch=st.integers(0, 10**6),
    task=st.text(max_size=8),
)
def test_every_epoch_has_each_row_once(rows: int, seed: int, epoch: int, task: str) -> None:
    slots = np.arange(epoch * rows, (epoch + 1) * rows)
    epochs, found = row_at(slots, rows=rows, seed=seed, task=task)
    assert (epochs == epoch).all()
    assert sorted(found.tolist()) == list(range(rows))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 17, 4096, 4097, 200_000])
def test_whole_epoch_is_a_permutation(rows: int) -> None:
    found = row_at(np.arange(rows), rows=rows, seed=0, task="t")[1]
    assert np.array_equal(np.sort(found), np.arange(rows))


@given(slots=st.lists(st.integers(0, 10**12), max_size=40), rows=st.integers(1, 10**9))
def test_slots_are_independent_of_each_other(slots: list[int], rows: int) -> None:
    epochs, found = row_at(slots, rows=rows, seed=3, task="t")
    for slot, epoch, row in zip(slots, epochs, found, strict=True):
        alone = row_at([slot], rows=rows, seed=3, task="t")
        assert (alone[0][0], alone[1][0]) == (epoch, row)
        assert 0 <= row < rows


def test_seed_epoch_and_task_change_the_order() -> None:
    base = row_at(np.arange(1000), rows=1000, seed=0, task="a")[1]
    others = [
        row_at(np.arange(1000), rows=1000, seed=1, task="a")[1],
        row_at(np.arange(1000), rows=1000, seed=0, task="b")[1],
        row_at(np.arange(1000, 2000), rows=1000, seed=0, task="a")[1],
    ]
    for other in others:
        # Two random orders share about one place of a thousand.
        assert (base == other).sum() < 20


def test_order_looks_random() -> None:
    rows = 200_000
    found = row_at(np.arange(rows), rows=rows, seed=5, task="t")[1]
    table = np.histogram2d(np.arange(rows), found, bins=64)[0]
    expected = rows / 64**2
    chi2 = ((table - expected) ** 2 / expected).sum()
    # 63 * 63 degrees of freedom: mean 3969, standard deviation 89; two rounds give about 10,000.
    assert 3969 - 5 * 89 < chi2 < 3969 + 5 * 89
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.02


@pytest.mark.parametrize("rows", [3, 6, 7])
def test_first_place_of_a_small_set_is_uniform_over_epochs(rows: int) -> None:
    epochs = 6000
    first = row_at(np.arange(epochs) * rows, rows=rows, seed=1, task="t")[1]
    counts = np.bincount(first, minlength=rows)
    # Five standard deviations of a binomial count.
    assert np.abs(counts - epochs / rows).max() < 5 * np.sqrt(epochs / rows)


@given(tasks=st.integers(1, 6), size=st.integers(1, 9), steps=st.integers(1, 40))
def test_round_robin_uses_each_tasks_slots_in_order_without_gaps(
    tasks: int, size: int, steps: int
) -> None:
    mixture = RoundRobin(tasks)
    slots: dict[int, list[int]] = {task: [] for task in range(tasks)}
    for step in range(steps):
        assert mixture.steps_before(step) == tuple(len(s) // size for s in slots.values())
        task, used = step_slots(step, mixture=mixture, global_batch_size=size)
        assert task == mixture.task_of(step)
        slots[task].extend(used.tolist())
    for used in slots.values():
        assert used == list(range(len(used)))


@given(
    rows=st.sampled_from([1, 2, 97, 4096, 200_000]),
    seed=st.integers(0, 3),
    first=st.one_of(st.integers(0, 3 * 4096), st.integers(0, 2**40)),
    count=st.one_of(st.integers(1, 300), st.sampled_from([4096, 4097, 10_000])),
)
def test_slots_in_a_run_hold_the_same_rows(rows: int, seed: int, first: int, count: int) -> None:
    found = rows_between(first, first + count, rows=rows, seed=seed, task="t")
    expected = row_at(np.arange(first, first + count), rows=rows, seed=seed, task="t")
    assert all(map(np.array_equal, found, expected))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="rows must be at least 1, got 0 for task 'empty'"):
        row_at([0], rows=0, seed=0, task="empty")
    with pytest.raises(ValueError, match="slots must not be negative, got -1"):
        row_at([-1], rows=3, seed=0, task="t")
    with pytest.raises(ValueError, match="slots must not be negative"):
        rows_between(-1, 3, rows=3, seed=0, task="t")
    with pytest.raises(ValueError, match="step must not be negative, got -1"):
        RoundRobin(2).task_of(-1)
    with pytest.raises(ValueError, match="at least 1 task"):
        RoundRobin(0)


def test_module_does_not_import_torch() -> None:
    code = "import sys, dist_ft.data.sampling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
