"""`dist-ft` and `python -m dist_ft`: what starts on a command line, and on every rank."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from typing import NoReturn

FAILED = 1


def run() -> NoReturn:
    """Run this process's command and end the process with its exit code.

    The process ends when its threads are joined and everybody's clean-up is done, without taking
    the interpreter apart, as the launcher's ranks do. A run that was stopped or has failed still
    holds its model, and with it modules of triton: those would come apart in an order that their
    bindings (nanobind) report as leaks, thirty lines below what the user must read.
    """
    code = FAILED

    def end() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

    # The last registered is called first: before all imports, this one is called last.
    atexit.register(end)
    from dist_ft.cli import main

    try:
        code = main()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        raise
    sys.exit(code)


if __name__ == "__main__":
    run()
