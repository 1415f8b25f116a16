"""Averages of the weights over the steps of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Averaging:
    """Which weights an average is of.

    Attributes:
        type: ``ema`` is an exponential moving average (Polyak and Juditsky 1992, with the constant
            decay that is usual since Tarvainen and Valpola 2017); ``swa`` is the plain mean of
            weights at intervals near the end of a run (Izmailov et al. 2018, algorithm 1).
        start: Steps before the first weights that count.
        every: Steps from one set of weights that counts to the next.
        decay: Of ``ema``: what is left of the average when new weights come in.
    """

    type: Literal["ema", "swa"]
    start: int = 0
    every: int = 1
    decay: float = 0.999

    def counts(self, done: int) -> bool:
        """Return whether the weights after `done` steps belong to the average."""
        return done > self.start and (done - self.start) % self.every == 0

    def newest(self, before: int) -> float:
        """Return the share of new weights in an average that `before` others are in."""
        if before == 0:
            return 1.0
        return 1.0 - self.decay if self.type == "ema" else 1.0 / (before + 1)
