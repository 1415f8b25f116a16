"""A mixture that follows the losses is a mixture: pure once decided, and never asked too early."""

import json
import random
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dist_ft.data.bandit import MOST_READ_AHEAD, BanditMixture
from dist_ft.data.loader import BatchPlan, StepLoader
from tests.helpers.datasets import SPEC, make_dataset


def make(tasks: int = 3, **options: Any) -> BanditMixture:
    defaults: dict[str, Any] = {"seed": 5, "block_steps": 16, "rate": 2.0, "smoothing": 0.5}
    return BanditMixture(tasks, **defaults | options)


def train(mixture: BanditMixture, losses: list[list[float]], *, first: int, end: int) -> list[int]:
    """Train the steps [first, end) and return their tasks; losses[task] are drawn in turn."""
    tasks = []
    for step in range(first, end):
        task = mixture.task_of(step)
        tasks.append(task)
        of_task = losses[task]
        shares = mixture.observe(of_task[step % len(of_task)], task=task, done=step + 1)
        if shares is not None:
            mixture.decide(shares)
    return tasks


LOSSES = st.lists(
    st.lists(
        st.one_of(st.floats(0, 50), st.sampled_from([float("nan"), float("inf")])),
        min_size=1,
        max_size=7,
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=30)
@given(losses=LOSSES, block=st.integers(8, 40), stop=st.integers(1, 150), seed=st.integers(0, 9))
# A first loss of next to nothing: the later ones are infinitely larger.
@example(losses=[[0.0], [0.0, 0.0, 5e-324, 1.0], [0.0]], block=8, stop=1, seed=8)
def test_decided_steps_stay_and_a_saved_state_goes_on(
    losses: list[list[float]], block: int, stop: int, seed: int
) -> None:
    options = {"seed": seed, "block_steps": block}
    straight = make(len(losses), **options)
    tasks = train(straight, losses, first=0, end=200)
    assert [straight.task_of(step) for step in range(200)] == tasks
    for step in (0, 1, 100, 199):
        counts = straight.steps_before(step)
        assert counts == tuple(tasks[:step].count(task) for task in range(len(losses)))
    # What a reader may ask for is decided before it asks.
    assert straight.decided_steps >= 200 + MOST_READ_AHEAD

    stopped = make(len(losses), **options)
    train(stopped, losses, first=0, end=stop)
    resumed = make(len(losses), **options)
    resumed.load_state(json.loads(json.dumps(stopped.state())))
    assert resumed.state() == stopped.state()
    assert train(resumed, losses, first=stop, end=200) == tasks[stop:]


def test_the_task_that_learns_least_comes_most() -> None:
    falling = [1 / (1 + step / 50) for step in range(1000)]
    mixture = make(3, block_steps=32)
    tasks = train(mixture, [falling, [1.0], falling], first=0, end=640)
    late = tasks[320:]
    assert late.count(1) > 1.8 * late.count(0)
    assert min(late.count(0), late.count(2)) > 0.05 * len(late)
    # Scales don't matter, only what became of them.
    large = train(make(3, block_steps=32), [falling, [900.0], falling], first=0, end=640)
    assert large == tasks
    equal = train(make(3, block_steps=32, rate=0.0), [falling, [1.0], falling], first=0, end=640)
    assert [abs(equal.count(task) - 640 / 3) < 2 for task in range(3)] == [True] * 3


def test_undecided_steps_and_bad_options_are_refused() -> None:
    mixture = make()
    assert mixture.task_of(15) in range(3)
    assert sum(mixture.steps_before(16)) == 16
    with pytest.raises(ValueError, match="decided 16 steps, but not yet step 16"):
        mixture.task_of(16)
    with pytest.raises(ValueError, match="not yet step 17"):
        mixture.steps_before(17)
    with pytest.raises(ValueError, match="must not be negative"):
        mixture.task_of(-1)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"block_steps": 7}, "every must be at least 8"),
        ({"tasks": 20}, "got 16 for 20 tasks"),
        ({"rate": -1.0}, "rate must be at least 0"),
        ({"smoothing": 1.0}, r"smoothing lie in \[0, 1\)"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            make(**options)
    other = mixture.state()
    mixture.load_state({"type": "fixed", "decided": "something else"})
    assert mixture.state() == other


def test_a_loader_that_reads_ahead_never_asks_too_early() -> None:
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        datasets = {
            name: make_dataset(Path(folder) / name, lengths=[3] * rows)
            for name, rows in (("a", 9), ("b", 30))
        }
        mixture = make(2, block_steps=8)
        loader = StepLoader(
            datasets,
            specs=dict.fromkeys(datasets, SPEC),
            plan=BatchPlan(4, 2, seed=0),
            mixture=mixture,
        )
        with closing(loader.iterate(0)) as steps:
            for done in range(1, 80):
                batch = next(steps)
                # The thread is given the time to read as far as it may.
                time.sleep(draw.choice((0, 0.002)))
                task = ("a", "b").index(batch.task)
                if shares := mixture.observe(draw.random(), task=task, done=done):
                    mixture.decide(shares)


def test_module_does_not_import_torch() -> None:
    code = "import sys, dist_ft.data.bandit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_task_whose_validation_gains_most_comes_most() -> None:
    mixture = make(3, block_steps=24, rate=4.0, smoothing=0.0, reward="gain")
    scores = [2.0, 2.0, 2.0]
    counts = [0, 0, 0]
    for step in range(240):
        task = mixture.task_of(step)
        counts[task] += 1
        # Only the second still learns; the third gets worse.
        scores = [scores[0], scores[1] * (0.99 if task == 1 else 1.0), scores[2] + 0.001]
        if (step + 1) % 12 == 0:
            mixture.observe_scores(scores)
        shares = mixture.observe(1.0, task=task, done=step + 1)
        if shares is not None:
            mixture.decide(shares)
            saved = json.loads(json.dumps(mixture.state()))
            again = make(3, block_steps=24, rate=4.0, smoothing=0.0, reward="gain")
            again.load_state(saved)
            assert again.state() == mixture.state()
    assert counts[1] > 0.7 * 240
    assert min(counts) > 0.04 * 240  # exploration
