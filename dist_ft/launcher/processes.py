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
from dist_ft.launcher.output import flush_output

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
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


def is_left_alone(number: int) -> bool:
    """Return whether a stopping signal is to stay ignored, as this process was started with it.

    So it is under nohup, and Ctrl-C in the background of a script. USR1 is another case: our own
    scripts ignore it until the launcher listens.
    """
    return number in (signal.SIGHUP, signal.SIGINT) and signal.getsignal(number) == signal.SIG_IGN


def _prepare(parent: int, *, listens: bool) -> None:
    """Tie this process to its parent, and let a request to stop wait until it listens.

    A scheduler signals every process at once, also those that are still importing. Who will never
    listen must hear all but what the launcher passes on: its own children have the same mask.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING if listens else [signal.SIGUSR1])
    die_with(parent)


def fork_rank(main: Callable[[], int], *, listens: bool = True) -> StartRank:
    """Return what starts a rank as a fork that runs `main`.

    Whatever this process has imported the rank needs not import: a restart takes tenths of a
    second. Only for processes without threads and without a CUDA context.

    Args:
        main: What the rank does; returns its exit code.
        listens: Whether it will listen to requests to stop; they wait until then.
    """

    def start(environment: Mapping[str, str]) -> Process:
        flush_output()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _be_a_rank(main, parent=parent, environment=environment, listens=listens)
        return ForkedProcess(pid)

    return start


def _be_a_rank(
    main: Callable[[], int], *, parent: int, environment: Mapping[str, str], listens: bool
) -> None:
    """Run `main` and end this process with what it returns, without the parent's clean-up."""
    code = 1
    try:
        _prepare(parent, listens=listens)
        os.setpgid(0, 0)  # Ctrl-C comes to the launcher alone, and each rank is asked once
        for number in STOPPING:
            if not is_left_alone(number):
                default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                signal.signal(number, default)
        os.environ.update(environment)
        code = main()
    except BaseException as error:
        note_error(error)
        sys.excepthook(type(error), error, error.__traceback__)
        raise
    finally:
        try:
            flush_output()
        finally:  # whatever happens: the code that comes next is the launcher's
            os._exit(code)


def run_rank(command: Sequence[str], *, listens: bool = True) -> StartRank:
    """Return what starts a rank as a new program; the rest is as of `fork_rank`."""

    def start(environment: Mapping[str, str]) -> Process:
        parent = os.getpid()
        return subprocess.Popen(
            list(command),
            env={**os.environ, **environment},
            process_group=0,
            # This process has one thread, and the function takes no lock.
            preexec_fn=lambda: _prepare(parent, listens=listens),  # noqa: PLW1509
        )

    return start
