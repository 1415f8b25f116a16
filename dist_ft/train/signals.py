"""Asks a run to stop: finish the step, save, exit with 75; a second signal exits at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# One request may come as several signals: a pre-empting scheduler signals every process of a job,
# and the launcher passes its own signal on.
SAME_REQUEST_S = 5.0


class StopRequest:
    """Remembers the first signal that asked this rank to stop."""

    def __init__(self) -> None:
        """Start with nothing asked."""
        self.signal = 0
        self._since = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the stopping signals while the block runs."""
        before = {number: signal.signal(number, self._handle) for number in STOPPING}
        # The launcher holds a request back until somebody listens.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - handler
        now = time.monotonic()
        if not self.signal:
            self.signal, self._since = number, now
        elif now - self._since > SAME_REQUEST_S:
            os._exit(128 + number)
