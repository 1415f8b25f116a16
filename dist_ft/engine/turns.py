"""The micro-batches of an optimizer step, of one task or of several in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn


class MicroBatchLike(Protocol):
    """The part of a micro-batch that the engine reads."""

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """Model arguments by name, each with micro-batch rows first."""
        ...

    @property
    def targets(self) -> Mapping[str, Tensor]:
        """Loss arguments by name, each with micro-batch rows first."""
        ...

    @property
    def index(self) -> int:
        """Index of the micro-batch in the global batch, the same for every world size."""
        ...

    @property
    def loss_weight(self) -> float:
        """1, or 0 for a filler that only keeps the ranks in step."""
        ...

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """The data set's row numbers."""
        ...

    @property
    def variants(self) -> npt.NDArray[np.int64] | None:
        """Which augmented version of each row this is; None if rows have only one."""
        ...

    @property
    def distinct(self) -> bool:
        """Whether no other micro-batch of the step has one of the rows."""
        ...


class Turn(Protocol):
    """A global batch of one task in an optimizer step."""

    @property
    def task(self) -> str:
        """The task."""
        ...

    @property
    def micro_batches(self) -> Sequence[MicroBatchLike]:
        """This rank's; as many on every rank."""
        ...

    @property
    def global_count(self) -> int:
        """Loss terms of the turn over all ranks; its loss is their mean."""
        ...


@dataclass(frozen=True)
class OwnTurn:
    """The turn that the arguments of `Engine.train_step` describe."""

    task: str
    micro_batches: Sequence[MicroBatchLike]
    global_count: int


@dataclass(frozen=True)
class Work:
    """A micro-batch of a step.

    Attributes:
        turn: Index of its turn.
        task: Its task.
        batch: The micro-batch.
        share: What its summed loss is multiplied by: the step's loss is the mean over turns of
            the mean over each turn's loss terms.
    """

    turn: int
    task: str
    batch: MicroBatchLike
    share: float


def work_of(turns: Sequence[Turn]) -> list[Work]:
    """Return the micro-batches of a step's turns, in the order that every rank runs them in."""
    # Where no row of a turn has a term of the loss, its sum is nothing, whatever it is divided by.
    return [
        Work(index, turn.task, batch, batch.loss_weight / (max(1, turn.global_count) * len(turns)))
        for index, turn in enumerate(turns)
        for batch in turn.micro_batches
    ]


def passes_of(module: nn.Module, task: str) -> int:
    """Return how often the next micro-batch is to go forward and backward; a module may say."""
    ask = getattr(module, "passes", None)
    return 1 if ask is None else ask(task)
