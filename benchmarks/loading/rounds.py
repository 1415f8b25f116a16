"""What loaders cost: each in a process of its own, in rounds that all of them share."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

MakeLoader = Callable[[], Iterator[Any]]

# Quick loaders deliver more batches, until this is over.
LEAST_SECONDS = 0.3


@dataclass(frozen=True)
class Cost:
    """What a sample costs in one round: CPU seconds, children included, and wall seconds."""

    cpu_s: float
    wall_s: float


class LoaderProcess:
    """A process with nothing but one loader: its threads and its memory are charged to no other.

    Args:
        make: makes the loader, an iterator of batches with "labels"; called for every round.
    """

    def __init__(self, make: MakeLoader) -> None:
        # Forked, as importing everything once more for each loader takes seconds.
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()

    def round(self, *, batches: int) -> Cost:
        """Returns what a sample costs in a round of at least so many batches.

        Raises:
            ModuleNotFoundError: the loader is not installed.
            RuntimeError: the loader failed.
        """
        self._connection.send(batches)
        try:
            answer = self._connection.recv()
        except EOFError as error:
            raise RuntimeError("the process of a loader died") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """Ends the process."""
        # One that has died can't be told to stop.
        with contextlib.suppress(BrokenPipeError):
            self._connection.send(None)
        self._process.join()


def _serve(connection: Connection, make: MakeLoader) -> None:
    # What was there before the loader is not to be looked through again and again.
    gc.freeze()
    while (batches := connection.recv()) is not None:
        try:
            answer: Cost | Exception = _cost(make(), batches=batches)
        except ModuleNotFoundError as error:
            answer = error
        connection.send(answer)
    # Threads of a loader that go on reading shall not complain that the data are gone.
    os._exit(0)


def _cost(loader: Iterator[Any], *, batches: int) -> Cost:
    """Returns what a sample costs after one batch to warm up."""
    next(loader)
    cpu, started = _cpu_seconds(), time.perf_counter()
    samples = 0
    for number, batch in enumerate(loader, start=1):
        # A planned batch may have other than 32 rows.
        samples += len(batch["labels"])
        if number >= batches and time.perf_counter() - started > LEAST_SECONDS:
            break
    wall = time.perf_counter() - started
    close = getattr(loader, "close", None)
    if close is not None:
        close()
    # After closing, so that what was read ahead and worker processes are counted.
    return Cost((_cpu_seconds() - cpu) / samples, wall / samples)


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def in_rounds(
    loaders: Mapping[str, MakeLoader], *, rounds: int, batches: int
) -> tuple[dict[str, list[Cost]], dict[str, str]]:
    """Returns each loader's cost in each round, and why loaders are left out.

    In turns, so that another user of the machine hinders all of them alike.
    """
    processes = {name: LoaderProcess(make) for name, make in loaders.items()}
    costs: dict[str, list[Cost]] = {name: [] for name in loaders}
    missing: dict[str, str] = {}
    try:
        for _ in range(rounds):
            for name in [name for name in processes if name not in missing]:
                try:
                    costs[name].append(processes[name].round(batches=batches))
                except ModuleNotFoundError as error:
                    missing[name] = str(error)
                    del costs[name]
    finally:
        for process in processes.values():
            process.close()
    return costs, missing
