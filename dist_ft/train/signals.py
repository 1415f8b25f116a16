"""Asks a run to stop: finish the step, save, exit with 75; a second signal exits at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers the first signal that asked this rank to stop."""

    def __init__(self) -> None:
        """Start with nothing asked."""
        self.signal = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the stopping signals while the block runs."""
        before = {number: signal.signal(number, self._handle) for number in STOPPING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - handler
        if self.signal:
            os._exit(128 + number)
        self.signal = number
