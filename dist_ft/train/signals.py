"""Asks a run to stop: finish the step, save, exit with 75; a second signal exits at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dist_ft.heartbeat import asked_by

# The launcher blocks the same ones in a rank until it listens.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# One request may come as several signals: a pre-empting scheduler signals every process of a job,
# and the launcher passes its own signal on.
SAME_REQUEST_S = 5.0
# What a person knows a signal by.
_NAMES = {
    signal.SIGINT: "Ctrl-C (SIGINT)",
    signal.SIGHUP: "the end of its terminal (SIGHUP)",
    signal.SIGUSR1: "SIGUSR1 (as schedulers send it)",
}


def stop_name(number: int | None) -> str:
    """Return what a user calls the signal of a ``stop`` event, such as "Ctrl-C (SIGINT)"."""
    try:
        known = signal.Signals(number or 0)
    except ValueError:
        return "a signal" if number is None else f"signal {number}"
    return _NAMES.get(known, known.name)


class StopRequest:
    """Remembers the first signal that asked this rank to stop.

    Attributes:
        signal: Its number, 0 if there was none. Of a signal that the launcher has passed on, the
            number of the one that the launcher was sent.
    """

    def __init__(self) -> None:
        """Start with nothing asked."""
        self.signal = 0
        self._since = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the stopping signals while the block runs."""
        # Under nohup, or with Ctrl-C in the background of a script; USR1 only waits to be caught.
        left = [n for n in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(n) == signal.SIG_IGN]
        numbers = [number for number in STOPPING if number not in left]
        before = {number: signal.signal(number, self._handle) for number in numbers}
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
            # The launcher passes every request on as USR1, which ranks can hold back.
            self.signal = (number == signal.SIGUSR1 and asked_by()) or number
            self._since = now
        elif now - self._since > SAME_REQUEST_S:
            os._exit(128 + number)
