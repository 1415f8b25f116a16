"""What the launcher tells: to the user and to its log, as far as somebody still takes it.

A run must not end because nobody reads its output any more: a terminal is closed, a pipe ends
before the launcher does, a disk is full or does not answer.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

# A disk that does not answer for longer is not waited for: the ranks come first.
_PATIENCE_S = 5.0


class Log:
    """The launcher's files in the folder of a run's logs; without a folder there are none."""

    def __init__(self, folder: Path | None) -> None:
        """Write into `folder`, which need not be there yet."""
        self._folder = folder

    def write(self, text: str) -> None:
        """Add a line with the time to ``supervisor.log``."""
        folder, line = self._folder, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n"
        if folder is None:
            return

        def append() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "supervisor.log").open("a", encoding="utf-8") as file:
                file.write(line)

        _try(append)

    def keep(self, files: Iterable[tuple[Path, str]]) -> None:
        """Copy files that will be gone soon, each to a name of its own."""
        folder = self._folder
        if folder is None:
            return

        def copy() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            for source, name in files:
                if source.exists():
                    shutil.copyfile(source, folder / name)

        _try(copy)


def _try(action: Callable[[], None]) -> None:
    """Do something to a disk that may be full, and that may not answer.

    Without a failure the thread is gone afterwards: ranks are forked from this process.
    """

    def quietly() -> None:
        with contextlib.suppress(OSError):
            action()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(_PATIENCE_S)


def flush_output() -> None:
    """Write out what is printed, if somebody still takes it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            stream.flush()


def let_go_of_lost_output() -> None:
    """Send what nobody takes any more nowhere: else Python ends with 120 instead of our code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except ValueError:
            continue
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
