"""Rank processes: started by fork or as new programs, and never left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from dist_ft.heartbeat import note_error

_PR_SET_PDEATHSIG = 1


class Process(Protocol):
    """A running rank."""

    @property
    def pid(self) -> int:
        """Its process id."""
        ...

    def poll(self) -> int | None:
        """Return its exit code, negative for the signal that ended it, or None."""
        ...


StartRank = Callable[[Mapping[str, str]], Process]


class ForkedProcess:
    """A child that was forked: `subprocess.Popen.poll` without a program of its own."""

    def __init__(self, pid: int) -> None:
        """Watch the child `pid`."""
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, negative for the signal that ended it, or None."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code


def die_with(parent: int) -> None:
    """End this process by SIGKILL when `parent` ends, however it ends (Linux only).

    Otherwise the ranks of a killed launcher would go on training, and write beside the next run.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before we could ask
        os._exit(1)


def _prepare(parent: int) -> None:
    """Tie this process to its parent, and let a request to stop wait until it listens."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    die_with(parent)


def fork_rank(main: Callable[[], int]) -> StartRank:
    """Return what starts a rank as a fork that runs `main`.

    Whatever this process has imported the rank needs not import: a restart takes tenths of a
    second. Only for processes without threads and without a CUDA context.
    """

    def start(environment: Mapping[str, str]) -> Process:
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _be_a_rank(main, parent=parent, environment=environment)
        return ForkedProcess(pid)

    return start


def _be_a_rank(main: Callable[[], int], *, parent: int, environment: Mapping[str, str]) -> None:
    """Run `main` and end this process with what it returns, without the parent's clean-up."""
    code = 1
    try:
        _prepare(parent)
        os.setpgid(0, 0)  # Ctrl-C comes to the launcher alone, and each rank is asked once
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(environment)
        code = main()
    except BaseException as error:
        note_error(error)
        sys.excepthook(type(error), error, error.__traceback__)
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_rank(command: Sequence[str]) -> StartRank:
    """Return what starts a rank as a new program."""

    def start(environment: Mapping[str, str]) -> Process:
        parent = os.getpid()
        return subprocess.Popen(
            list(command),
            env={**os.environ, **environment},
            process_group=0,
            # This process has one thread, and the function takes no lock.
            preexec_fn=lambda: _prepare(parent),  # noqa: PLW1509
        )

    return start
