"""Several turns of a mixture in one optimizer step."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from dist_ft.data.loader import StepBatch, StepLoader, StepRows

# Between the numbers of the micro-batches of a step's turns, from which dropout draws.
_TURN = 1 << 20


class JoinedLoader:
    """Delivers steps that accumulate `turns` turns of a mixture, each a global batch of one task.

    Turn i of step s is what would be step ``turns * s + i`` of the loader, so everything that holds
    for its order holds here: it is a pure function of the step, on any number of ranks.
    """

    def __init__(self, loader: StepLoader, *, turns: int) -> None:
        """Join the steps of `loader`.

        Args:
            loader: Delivers the turns.
            turns: Of a step, two or more.
        """
        self._loader = loader
        self._turns = turns

    def replan(self, micro_batch_size: int, *, max_tokens: int | None) -> None:
        """Divides later steps into other micro-batches; see `StepLoader.replan`."""
        self._loader.replan(micro_batch_size, max_tokens=max_tokens)

    def turns_of(self, step: int) -> list[StepRows]:
        """Returns which rows each turn of a step uses, over all ranks."""
        return [self._loader.rows_of(turn) for turn in self._numbers(step)]

    def batch(self, step: int) -> StepBatch:
        """Returns this rank's part of a step; a pure function of the step."""
        return self._join(step, [self._loader.batch(turn) for turn in self._numbers(step)])

    def iterate(self, start_step: int) -> Generator[StepBatch, None, None]:
        """Yields the steps from `start_step` on without end; see `StepLoader.iterate`."""
        step = start_step
        with closing(self._loader.iterate(start_step * self._turns)) as batches:
            while True:
                yield self._join(step, [next(batches) for _ in range(self._turns)])
                step += 1

    def _numbers(self, step: int) -> range:
        return range(step * self._turns, (step + 1) * self._turns)

    def _join(self, step: int, turns: list[StepBatch]) -> StepBatch:
        for place, turn in enumerate(turns):
            for micro_batch in turn.micro_batches:
                micro_batch.index += place * _TURN
        self._mark_repeated(step, turns)
        first, *others = turns
        return replace(first, step=step, joined=others)

    def _mark_repeated(self, step: int, turns: list[StepBatch]) -> None:
        """Say of micro-batches whether another of the step has one of their rows."""
        rows: dict[str, list[Any]] = {}
        for selected in self.turns_of(step):
            rows.setdefault(selected.task, []).append(selected.rows)
        for task, parts in rows.items():
            together = np.concatenate(parts)
            if len(parts) > 1 and len(np.unique(together)) < len(together):
                for micro_batch in (m for t in turns if t.task == task for m in t.micro_batches):
                    micro_batch.distinct = False

    def state_dict(self, step: int) -> dict[str, Any]:
        """Returns what the order depends on and the next step; see `StepLoader.state_dict`."""
        return {**self._loader.state_dict(step), "tasks_per_step": self._turns}

    def check_state(self, state: Mapping[str, Any]) -> int:
        """Returns the next step of a saved state after comparing it with this loader.

        Raises:
            ValueError: something differs.
        """
        if state.get("tasks_per_step") != self._turns:
            raise ValueError(
                f"mixture.tasks_per_step: the checkpoint has {state.get('tasks_per_step', 1)}, the "
                f"recipe {self._turns}: resume with the checkpoint's, or start a new run"
            )
        own = {key: value for key, value in state.items() if key != "tasks_per_step"}
        return self._loader.check_state(own)
