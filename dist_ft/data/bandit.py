"""A mixture that follows the run: blocks of steps whose shares are decided while training runs.

The shares of a block come from exponential weights with exploration, as in Exp3 (Auer,
Cesa-Bianchi, Freund and Schapire 2002, section 3). The reward of a task is its loss, as in Online
Data Mixing (Albalak et al. 2023), relative to the first one, as the losses of different tasks have
different scales: a task that has learnt less comes more often. A block has steps of every task
unless it is very short, so that rewards are means and need no importance weights.

The reward may be what a task's steps gain on validation instead: the share by which its validation
loss has fallen between two evaluations for each step that it had (learning progress, Graves et al.
2017, section 3), relative to the largest of all tasks. A task that still learns comes more often,
one that has learnt all it can, or nothing, less.

What is decided is part of the mixture's state; between decisions it is a pure function of the step,
as every mixture is. A block is decided a few steps before it begins, so that a loader that reads
ahead never asks for what nobody knows yet.

This module never imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dist_ft.data.block_mixture import MIXTURE_ALGORITHM_VERSION, BlockMixture

# A loader reads at most this many steps ahead of the one that trains, that one included.
MOST_READ_AHEAD = 4
LEAST_BLOCK = 2 * MOST_READ_AHEAD
# Of the steps of a block, which share is dealt out equally.
_EXPLORATION = 0.2
# A loss this many times the first one wins in any case. Where the first was next to nothing, the
# quotient may be infinite, and the shares that follow from it no numbers.
_MOST_REWARD = 100.0


class BanditMixture:
    """Decides the shares of each block from the losses before it.

    Args:
        tasks: how many tasks are mixed.
        seed: the run's seed.
        block_steps: steps of a block.
        rate: how much a task gains from a larger loss; 0 leaves the shares equal.
        smoothing: weight of the earlier rewards against the newest.
        reward: ``loss``, or ``gain`` on validation; see `observe_scores`.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        tasks: int,
        *,
        seed: int,
        block_steps: int,
        rate: float,
        smoothing: float,
        reward: str = "loss",
    ) -> None:
        if tasks < 1 or block_steps < max(LEAST_BLOCK, tasks):
            raise ValueError(
                f"mixture.every must be at least {LEAST_BLOCK} steps and no fewer than tasks, got "
                f"{block_steps} for {tasks} tasks"
            )
        if rate < 0 or not 0 <= smoothing < 1:
            raise ValueError(
                "mixture.rate must be at least 0 and smoothing lie in [0, 1), got "
                f"{rate} and {smoothing}"
            )
        if reward not in ("loss", "gain"):
            raise ValueError(f"mixture.reward must be loss or gain, got {reward!r}")
        self._tasks = tasks
        self._follows_gain = reward == "gain"
        # The last validation losses, and each task's steps since then.
        self._scores: list[float | None] = [None] * tasks
        self._since = [0] * tasks
        self._seed = seed
        self._steps = block_steps
        self._rate = rate
        self._smoothing = smoothing
        self._set([[1 / tasks] * tasks])
        self._first: list[float | None] = [None] * tasks
        self._rewards = [1.0] * tasks
        # Sum and number of the losses since the last decision, by task.
        self._sums = [0.0] * tasks
        self._counts = [0] * tasks

    @property
    def tasks(self) -> int:
        """How many tasks are mixed."""
        return self._tasks

    @property
    def decided_steps(self) -> int:
        """How many steps have a task so far."""
        return len(self._shares) * self._steps

    def task_of(self, step: int) -> int:
        """Returns the index of the step's task.

        Raises:
            ValueError: the step is negative, or not decided yet.
        """
        self._check(step, end=self.decided_steps - 1)
        return self._blocks.task_of(step)

    def steps_before(self, step: int) -> tuple[int, ...]:
        """Returns how many of the steps before `step` each task had.

        Raises:
            ValueError: the step is negative, or those before it are not decided yet.
        """
        self._check(step, end=self.decided_steps)
        return self._blocks.steps_before(step)

    def observe(self, loss: float, *, task: int, done: int) -> list[float] | None:
        """Takes the loss of a step, and returns the shares of a block if that decides one.

        Args:
            loss: mean loss of the step over all ranks; one that is not finite is of a step whose
                update was left out, and says nothing.
            task: the step's task.
            done: steps done with this one.
        """
        if math.isfinite(loss):
            self._since[task] += 1
            self._sums[task] += loss
            self._counts[task] += 1
        return self.due(done)

    def due(self, done: int) -> list[float] | None:
        """Returns the shares of the next block once it is time to decide it, which `decide` does.

        Args:
            done: steps done.
        """
        if done < self.decided_steps - MOST_READ_AHEAD:
            return None
        if not self._follows_gain:
            self._reward()
        most = max(self._rewards)
        weights = [math.exp(self._rate * (reward - most)) for reward in self._rewards]
        total = math.fsum(weights)
        equal = _EXPLORATION / self._tasks
        return [(1 - _EXPLORATION) * weight / total + equal for weight in weights]

    def observe_scores(self, losses: Sequence[float]) -> None:
        """Takes the tasks' validation losses, whose fall is the reward if that is the gain.

        Args:
            losses: one for each task; one that is not finite says nothing.
        """
        if not self._follows_gain:
            return
        gains: dict[int, float] = {}
        for task, loss in enumerate(losses):
            before, steps = self._scores[task], self._since[task]
            if not math.isfinite(loss):
                continue
            if before is not None and before > 0 and steps:
                gains[task] = max(0.0, (before - loss) / before / steps)
            self._scores[task], self._since[task] = loss, 0
        most = max(gains.values(), default=0.0)
        for task, gain in gains.items():
            newest = gain / most if most > 0 else 0.0
            self._rewards[task] = (
                self._smoothing * self._rewards[task] + (1 - self._smoothing) * newest
            )

    def decide(self, shares: Sequence[float]) -> None:
        """Fixes the shares of the next block; the same ones on every rank."""
        self._set([*self._shares, list(shares)])

    def state(self) -> dict[str, object]:
        """Returns what the mixture depends on and what it has decided, as JSON."""
        return {
            "type": "bandit",
            "version": MIXTURE_ALGORITHM_VERSION,
            "tasks": self._tasks,
            "seed": self._seed,
            "block_steps": self._steps,
            "rate": self._rate,
            "smoothing": self._smoothing,
            "decided": [list(shares) for shares in self._shares],
            "first": list(self._first),
            "rewards": list(self._rewards),
            "sums": list(self._sums),
            "counts": list(self._counts),
            **self._gain_state(),
        }

    def _gain_state(self) -> dict[str, object]:
        if not self._follows_gain:
            return {}
        return {"reward": "gain", "scores": list(self._scores), "since": list(self._since)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state; that of another mixture is left for the loader to refuse."""
        if state.get("type") != "bandit" or state.get("tasks") != self._tasks:
            return
        self._set([list(shares) for shares in state["decided"]])
        self._first = list(state["first"])
        self._rewards = list(state["rewards"])
        self._sums = list(state["sums"])
        self._counts = list(state["counts"])
        if self._follows_gain and state.get("reward") == "gain":
            self._scores, self._since = list(state["scores"]), list(state["since"])

    def _reward(self) -> None:
        for task, (total, count) in enumerate(zip(self._sums, self._counts, strict=True)):
            if not count or not math.isfinite(total):
                continue
            mean = total / count
            first = self._first[task]
            if first is None:
                first = self._first[task] = mean
            relative = min(mean / first, _MOST_REWARD) if first > 0 else 1.0
            kept = self._smoothing * self._rewards[task]
            self._rewards[task] = kept + (1 - self._smoothing) * relative
        self._sums = [0.0] * self._tasks
        self._counts = [0] * self._tasks

    def _set(self, shares: list[list[float]]) -> None:
        # The steps of a block depend on its own shares and on those before; the equal ones behind
        # them are never asked for.
        equal = [1 / self._tasks] * self._tasks
        blocks = BlockMixture(
            [*shares, equal], seed=self._seed, block_steps=self._steps, policy={"type": "bandit"}
        )
        # The thread of a loader may be asking: it finds the old blocks or the new ones.
        self._blocks = blocks
        self._shares = shares

    def _check(self, step: int, *, end: int) -> None:
        if step > end:
            raise ValueError(
                f"the mixture has decided {self.decided_steps} steps, but not yet step {step}: it "
                "follows the losses of the run, so ask for a step that was trained"
            )
