import itertools
import json
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft.data.mixtures import (
    MIXTURE_ALGORITHM_VERSION,
    POLICIES,
    annealed,
    epochs_after,
    examples_proportional,
    make_mixture,
    temperature_scaled,
    unimax,
)
from dist_ft.data.sampling import Mixture, RoundRobin, step_slots

SIZES = st.lists(st.integers(1, 10**7), min_size=1, max_size=12)
# Frozen: a change of these numbers is a change of every mixed run and needs a new version.
GOLDEN_VERSION = 1
GOLDEN: list[tuple[str, list[int], int, dict[str, Any], int, str, tuple[int, ...]]] = [
    # (policy, rows, seed, options, step, tasks of the next 24 steps, steps before)
    (
        "examples_proportional", [100, 2000, 40000], 0, {"cap": 10000}, 0,
        "222221222221222221222221", (0, 0, 0),
    ),
    (
        "temperature", [5381, 87599, 200], 7, {"temperature": 2.0}, 1000,
        "101111011101111211011101", (191, 772, 37),
    ),
    (
        "annealed", [100, 3000, 40000, 9], 42, {"total_steps": 5000}, 2490,
        "122222212222122222122202", (22, 283, 2181, 4),
    ),
    (
        "annealed", [100, 3000, 40000, 9], 42, {"total_steps": 5000}, 10**9,
        "321202121202132210212231", (144787382, 285863077, 479900538, 89449003),
    ),
    (
        "fixed", [1] * 5, 2**31, {"weights": [1, 2, 3, 4, 5.5]}, 300000,
        "434234104324341243243140", (19354, 38710, 58065, 77420, 106451),
    ),
    (
        "unimax", [500, 10**6, 30000], 3, {"total_rows": 10**6, "max_epochs": 4}, 255,
        "111211111112111111112111", (0, 224, 31),
    ),
]  # fmt: skip


def draw(mixture: Mixture, *, steps: int, start: int = 0) -> np.ndarray:
    return np.array([mixture.task_of(step) for step in range(start, start + steps)])


def policies_of(rows: list[int], data: st.DataObject) -> Mixture:
    policy = data.draw(st.sampled_from(sorted(POLICIES)))
    options: dict[str, Any] = {
        "examples_proportional": {"cap": 5000},
        "temperature": {"temperature": 3.0},
        "annealed": {"total_steps": data.draw(st.integers(1, 3000))},
        "fixed": {"weights": [1 + 7 * (i % 3) for i in range(len(rows))]},
        "unimax": {"total_rows": 10**6, "max_epochs": 2},
    }[policy]
    return make_mixture(policy, rows=rows, seed=data.draw(st.integers(0, 2**40)), **options)


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.floats(0.001, 1), min_size=1, max_size=20), seed=st.integers(-9, 2**40))
def test_drawn_shares_are_the_targets(weights: list[float], seed: int) -> None:
    mixture = make_mixture("fixed", rows=[1] * len(weights), seed=seed, weights=weights)
    shares = np.array(weights) / sum(weights)
    steps = 10_000
    drawn = np.array(mixture.steps_before(steps))
    assert drawn.sum() == steps
    assert np.abs(drawn / steps - shares).max() < 0.01
    # Much nearer in fact: at no time is a task more than a few steps ahead or behind.
    places = np.arange(0, steps + 1, 37)
    counts = np.array([mixture.steps_before(int(step)) for step in places])
    assert np.abs(counts - places[:, None] * shares).max() < 3
    blocks = np.arange(0, steps, 256)
    counts = np.array([mixture.steps_before(int(step)) for step in blocks])
    assert np.abs(counts - blocks[:, None] * shares).max() < 1.5


@settings(max_examples=40, deadline=None)
@given(rows=SIZES, start=st.integers(0, 10**7), data=st.data())
def test_steps_before_counts_task_of(rows: list[int], start: int, data: st.DataObject) -> None:
    mixture = policies_of(rows, data)
    steps = 300
    tasks = draw(mixture, steps=steps, start=start)
    counts = np.array([mixture.steps_before(step) for step in range(start, start + steps + 1)])
    assert (counts.sum(axis=1) == np.arange(start, start + steps + 1)).all()
    assert (np.diff(counts, axis=0) == (tasks[:, None] == np.arange(len(rows)))).all()


@settings(max_examples=25, deadline=None)
@given(rows=SIZES, steps=st.integers(1, 400), data=st.data())
def test_every_tasks_slots_come_in_order_without_gaps(
    rows: list[int], steps: int, data: st.DataObject
) -> None:
    mixture = policies_of(rows, data)
    slots: dict[int, list[int]] = {task: [] for task in range(len(rows))}
    for step in range(steps):
        task, used = step_slots(step, mixture=mixture, global_batch_size=3)
        slots[task].extend(used.tolist())
    for used in slots.values():
        assert used == list(range(len(used)))


def test_a_step_is_found_alone_and_in_any_order() -> None:
    def build() -> Mixture:
        return make_mixture("temperature", rows=[10, 500, 90_000], seed=3, temperature=2.0)

    forward = draw(build(), steps=2000)
    mixture = build()
    for step in np.random.default_rng(0).permutation(2000).tolist():
        # Now and then a fresh object, as after a restart.
        mixture = build() if step % 100 == 0 else mixture
        assert mixture.task_of(step) == forward[step]


def test_tasks_are_spread_evenly() -> None:
    mixture = make_mixture("fixed", rows=[1, 1, 1], seed=5, weights=[1, 2, 7])
    places = np.flatnonzero(draw(mixture, steps=20_000) == 0)
    # Ideal gap 10; a rotated block may bring two nearer or push them apart.
    assert np.diff(places).max() <= 20
    assert (np.diff(places) == 10).mean() > 0.5


def test_seed_rotates_the_blocks() -> None:
    one, other = (
        draw(make_mixture("fixed", rows=[1, 1], seed=seed, weights=[1, 2]), steps=1024)
        for seed in (0, 1)
    )
    assert (one != other).any()
    blocks = one.reshape(4, 256)
    assert len({tuple(block) for block in blocks.tolist()}) > 1


def test_lookup_costs_the_same_at_any_step() -> None:
    mixture = make_mixture("fixed", rows=[1] * 4, weights=[1, 2, 3, 4])

    def seconds(step: int) -> float:
        mixture.steps_before(step)
        started = time.perf_counter()
        for extra in range(200):
            mixture.steps_before(step + extra)
            mixture.task_of(step + extra)
        return time.perf_counter() - started

    early, late = min(seconds(0) for _ in range(3)), min(seconds(10**12) for _ in range(3))
    assert late < 0.2
    assert late < 10 * early


@given(rows=SIZES)
def test_shares_of_the_policies(rows: list[int]) -> None:
    (equal,) = temperature_scaled(rows, temperature=1e9)
    assert np.allclose(equal, 1 / len(rows))
    (proportional,) = examples_proportional(rows)
    assert np.allclose(proportional, np.array(rows) / sum(rows))
    assert np.allclose(proportional, temperature_scaled(rows, temperature=1.0)[0])
    (capped,) = examples_proportional(rows, cap=1)
    assert np.allclose(capped, 1 / len(rows))
    anneal = annealed(rows, total_steps=5000, start=1.0, end=0.0)
    assert np.allclose(anneal[-1], 1 / len(rows))
    assert np.allclose(anneal[0], proportional, atol=0.05)
    largest = int(np.argmax(rows))
    assert all(a[largest] >= b[largest] - 1e-12 for a, b in itertools.pairwise(anneal))


@given(rows=SIZES, total=st.integers(1, 10**9), epochs=st.floats(0.1, 20))
def test_unimax_gives_no_task_more_than_its_epochs(
    rows: list[int], total: int, epochs: float
) -> None:
    (shares,) = unimax(rows, total_rows=total, max_epochs=epochs)
    used = np.array(shares) * min(total, epochs * sum(rows))
    assert (used <= epochs * np.array(rows) * (1 + 1e-9)).all()
    free = used < epochs * np.array(rows) * (1 - 1e-9)
    # Those that are not at their limit have equal shares, and the largest ones.
    if free.any():
        assert np.allclose(np.array(shares)[free], max(shares))


def test_unimax_example() -> None:
    # 3000 rows over sizes 100, 1000, 5000 with two epochs: 200, then (3000 - 200) / 2 each.
    (shares,) = unimax([5000, 100, 1000], total_rows=3000, max_epochs=2)
    assert np.allclose(shares, np.array([1400, 200, 1400]) / 3000)


def test_annealing_follows_its_schedule() -> None:
    rows = [100, 10_000]
    mixture = make_mixture("annealed", rows=rows, total_steps=8000, start=1.0, end=0.2)
    tasks = draw(mixture, steps=12_000)
    for first, progress in ((0, 500 / 8000), (4000, 4500 / 8000), (9000, 1.0)):
        exponent = 1 + (0.2 - 1) * progress
        share = 100**exponent / (100**exponent + 10_000**exponent)
        assert abs((tasks[first : first + 1000] == 0).mean() - share) < 0.01


def test_epochs_are_counted() -> None:
    mixture = make_mixture("fixed", rows=[100, 300], weights=[1, 1])
    assert epochs_after(mixture, step=512, rows=[100, 300], global_batch_size=10) == (
        25.6,
        pytest.approx(256 * 10 / 300),
    )
    assert isinstance(make_mixture("round_robin", rows=[1, 2]), RoundRobin)


def test_state_says_what_changed() -> None:
    def state(**change: Any) -> dict[str, object]:
        options = {"rows": [10, 20], "seed": 1, "weights": (1, 2)} | change
        mixture = make_mixture("fixed", **options)
        return mixture.state()

    assert state() == state() == json.loads(json.dumps(state()))
    for change in ({"seed": 2}, {"rows": [10, 21]}, {"weights": (1, 3)}):
        assert state(**change) != state()


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("loss", {}, "'loss' is unknown: choose one of round_robin, examples_proportional,"),
        ("fixed", {}, r"missing \['weights'\]"),
        ("fixed", {"weights": [1, 2], "cap": 3}, r"takes the options weights: unknown \['cap'\]"),
        ("round_robin", {"weights": [1, 2]}, r"options \(none\): unknown \['weights'\]"),
        ("fixed", {"weights": [1]}, "one weight for each of the 2 tasks, got 1"),
        ("fixed", {"weights": [1, 0]}, "must be positive"),
        ("fixed", {"weights": [1, float("nan")]}, "must be positive"),
        ("temperature", {"temperature": 0}, "temperature must be positive, got 0"),
        ("examples_proportional", {"cap": 0}, "cap must be at least 1"),
        ("annealed", {"total_steps": 0}, "total_steps must be at least 1"),
        ("unimax", {"total_rows": 5, "max_epochs": 0}, "max_epochs positive"),
    ],
)
def test_bad_mixtures(policy: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_mixture(policy, rows=[1, 2], **options)


def test_bad_rows_and_steps() -> None:
    with pytest.raises(ValueError, match="at least 1 row each"):
        make_mixture("round_robin", rows=[])
    with pytest.raises(ValueError, match="at least 1 row each"):
        make_mixture("fixed", rows=[1, 0], weights=[1, 1])
    with pytest.raises(ValueError, match="step must not be negative, got -1"):
        make_mixture("fixed", rows=[1], weights=[1]).task_of(-1)


def test_golden_vectors() -> None:
    assert MIXTURE_ALGORITHM_VERSION == GOLDEN_VERSION
    assert len(GOLDEN) >= 5
    for policy, rows, seed, options, step, tasks, before in GOLDEN:
        mixture = make_mixture(policy, rows=rows, seed=seed, **options)
        assert "".join(map(str, draw(mixture, steps=24, start=step))) == tasks, policy
        assert mixture.steps_before(step) == before, policy


def test_module_does_not_import_torch() -> None:
    code = "import sys, dist_ft.data.mixtures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
