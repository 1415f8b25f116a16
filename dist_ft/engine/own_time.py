"""How long a rank itself takes for its forward passes, without what it waits for others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class OwnTime:
    """Adds up forward passes until `take`; on a GPU by events, without waiting for it.

    In stages 0 to 2 a GPU's forward pass talks to nobody. In stage 3 it gathers weights, and on
    CPUs those of the last step may still arrive. The wait is left out where the host does it (on
    CPUs). A GPU's stream waits itself: there the ranks of stage 3 look alike.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._seconds = 0.0
        self._waited = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Measure the block."""
        if torch.cuda.is_available():
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            yield
            pair[1].record()
            self._events.append(pair)
            return
        self._waited = 0.0
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began - self._waited

    def leave_out(self, owner: Any, name: str) -> None:
        """Leave out, from now on, what a method of `owner` takes: it waits for other ranks."""
        method: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self._waited += time.perf_counter() - began

        setattr(owner, name, timed)

    def take(self) -> float:
        """Return the seconds since the last call."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1e3
        self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds
