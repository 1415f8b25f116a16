"""One writer for a run folder: a lock that the kernel frees when its holder ends, however."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path

LOCK_FILE = ".lock"
# A rank that was just killed holds its lock until the kernel has taken it down.
_PATIENCE_S = 3.0


class RunLock:
    """Holds the lock of a folder from `acquire` until the process ends or `release`."""

    def __init__(self, folder: Path) -> None:
        """Lock `folder`; nothing happens yet."""
        self._path = folder / LOCK_FILE
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        ``flock`` knows no clock: it holds as long as the process, through any jump of time.

        Raises:
            ValueError: If another process holds it, naming that process.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                holder = os.read(descriptor, 200).decode(errors="replace").strip()
                os.close(descriptor)
                raise ValueError(
                    f"{self._path.parent} is being written by another run ({holder or 'unknown'}): "
                    "wait for it, stop it, or choose another name"
                ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
