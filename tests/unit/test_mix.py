"""A mixture that follows the losses decides in time, whatever becomes of the steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dist_ft.data.bandit import MOST_READ_AHEAD, BanditMixture
from dist_ft.train.loop import Progress
from dist_ft.train.mix import FollowLosses

NAN = float("nan")
TASKS = ("a", "b")


class _Told(list[tuple[str, int, dict[str, Any]]]):
    def event(self, kind: str, *, step: int, **fields: Any) -> None:
        self.append((kind, step, fields))


def _follow() -> tuple[FollowLosses, BanditMixture, _Told]:
    told = _Told()
    mixture = BanditMixture(2, seed=5, block_steps=8, rate=2.0, smoothing=0.5)
    evaluate: Any = SimpleNamespace(done_at=-1, last={}, recorder=told)
    return FollowLosses(mixture, tasks=TASKS, evaluate=evaluate), mixture, told


def _at(step: int) -> Any:
    return SimpleNamespace(progress=Progress(step=step))


@pytest.mark.parametrize("bad", [{4}, {3, 4, 5}, set(range(1, 33))])
def test_a_refused_step_holds_up_no_decision(bad: set[int]) -> None:
    follow, mixture, told = _follow()
    follow.on_fit_start(_at(0))
    for done in range(1, 33):
        task = mixture.task_of(done - 1)
        # What a loader that reads ahead asks for.
        mixture.task_of(done + MOST_READ_AHEAD - 2)
        # A refused step's loss may look like any other, as where the gradient is not finite.
        result: Any = SimpleNamespace(
            refused="the gradient is not finite" if done in bad else None,
            turn_losses=(NAN if done % 2 and done in bad else 1e9 if done in bad else 1.0,),
        )
        batch: Any = SimpleNamespace(task=TASKS[task])
        follow.on_step_end(_at(done), batch, result)
    assert [(step, e["from_step"]) for _, step, e in told] == [(4, 8), (12, 16), (20, 24), (28, 32)]
    # All good losses were the same, so that no task is worth more than the other.
    assert all(e["shares"] == {"a": 0.5, "b": 0.5} for _, _, e in told)


def test_a_block_that_is_overdue_is_decided_before_a_loader_asks() -> None:
    follow, mixture, told = _follow()
    follow.on_fit_start(_at(6))  # as a checkpoint has it whose step 4 was refused
    assert [step for _, step, _ in told] == [6]
    assert mixture.decided_steps == 16
