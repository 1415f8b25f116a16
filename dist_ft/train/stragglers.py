"""Finds the rank that all others wait for in every step: a throttled device, a busy host."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from dist_ft.config import SupervisionConfig
from dist_ft.train.console import Console
from dist_ft.train.recorder import Recorder

# Who lost less than this in all intervals together is not worth a warning.
_LEAST_S = 1.0


@dataclass
class SlowRanks:
    """Warns of a rank that was slower than the others for some logging intervals in a row.

    Ranks that train together take equally long for a step; what counts is the time of their own in
    it: waiting for data, and forward passes without the wait for other ranks.

    Attributes:
        factor: How much slower than the median a slow rank is.
        intervals: How many in a row.
    """

    recorder: Recorder
    console: Console
    factor: float
    intervals: int
    _in_a_row: dict[int, int] = field(default_factory=dict)
    _lost_s: dict[int, float] = field(default_factory=dict)

    def see(self, step: int, own_s: Sequence[float]) -> None:
        """Look at an interval that ends with `step`: the seconds of each rank's own, by rank."""
        # Of two ranks the faster one says what is usual.
        usual = statistics.median_low(own_s)
        for rank, seconds in enumerate(own_s):
            if seconds <= self.factor * usual:
                self._in_a_row.pop(rank, None)
                self._lost_s.pop(rank, None)
                continue
            self._in_a_row[rank] = self._in_a_row.get(rank, 0) + 1
            self._lost_s[rank] = self._lost_s.get(rank, 0.0) + seconds - usual
            # Once, until it was as quick as the others again.
            if self._in_a_row[rank] >= self.intervals and self._lost_s[rank] >= _LEAST_S:
                self._in_a_row[rank] = -(2**60)
                self._warn(step, rank=rank, seconds=seconds, usual=usual)

    def _warn(self, step: int, *, rank: int, seconds: float, usual: float) -> None:
        self.recorder.event(
            "straggler",
            step=step,
            rank=rank,
            own_s=round(seconds, 4),
            median_own_s=round(usual, 4),
            intervals=self.intervals,
            lost_s=round(self._lost_s[rank], 3),
        )
        self.console.say(
            f"WARNING: step {step}: rank {rank} holds the others up, {seconds:.2f} s against "
            f"{usual:.2f} s of the median rank for {self.intervals} logging intervals: look at its "
            "node (other jobs, clock and temperature of the device, disk)"
        )


def slow_ranks(config: SupervisionConfig, *, recorder: Recorder, console: Console) -> SlowRanks:
    """Return what warns of slow ranks as a recipe says."""
    return SlowRanks(recorder, console, config.straggler_factor, config.straggler_intervals)
