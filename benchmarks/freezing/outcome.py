"""Runs a system on forked ranks and measures what became of its weights."""

from __future__ import annotations

import datetime
import gc
import importlib
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import (
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

Weights = dict[str, Tensor]
# A collective that a rank never joins is an error after this time.
TIMEOUT = datetime.timedelta(seconds=20)


def copy_of(parameters: Mapping[str, Tensor]) -> Weights:
    """Return copies of the parameters in fp32, without the prefix that DDP puts before names."""
    return {
        name.removeprefix("module."): p.detach().float().clone() for name, p in parameters.items()
    }


@dataclass
class Recorder:
    """What a rank leaves behind: its weights before the first phase and after each, and a note."""

    snapshots: list[Weights] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One system in one setting.

    Attributes:
        labels: What the row of the table begins with.
        run: Called on every rank.
        world_size: Ranks.
        note: What the row should say besides its numbers.
    """

    labels: dict[str, str]
    run: Callable[[Recorder], None]
    world_size: int = 2
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a case gave.

    Attributes:
        snapshots: By rank, then by phase; empty when the system died.
        note: What the system said, or how it ended.
        failed: Whether it ended before the schedule did.
        seconds: Wall time.
    """

    snapshots: list[list[Weights]]
    note: str
    failed: bool
    seconds: float


def run_cases(cases: Sequence[Case], *, load: Callable[[], None]) -> list[Outcome]:
    """Run the cases one after another in a process of their own, each on fresh ranks.

    Args:
        cases: What to run.
        load: Imports what the ranks need, once, in the process that they are forked from.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Forked, not spawned: two ranks start in 0.1 s instead of 10, and nothing is pickled.
        host = multiprocessing.get_context("fork").Process(target=_host, args=(cases, load, folder))
        host.start()
        host.join()
        log = (folder / "log").read_text(errors="replace")
        return [_outcome(case, folder / str(i), log=log) for i, case in enumerate(cases)]


def _host(cases: Sequence[Case], load: Callable[[], None], folder: Path) -> None:
    _redirect_output(folder / "log")
    load()
    # Optimizers and ZeRO (its Muon) import torch's compiler, for seconds: not again in every rank.
    importlib.import_module("torch._inductor.compile_fx")
    gc.freeze()  # the ranks' collections need not walk what was imported
    for i, case in enumerate(cases):
        own = folder / str(i)
        own.mkdir()
        began = time.monotonic()
        try:
            start_processes(
                _rank_main,
                args=(case, own),
                nprocs=case.world_size,
                start_method="fork",
            )
        except (ProcessRaisedException, ProcessExitedException) as error:
            (own / "error").write_text(last_error(str(error)))
        (own / "seconds").write_text(str(time.monotonic() - began))


def _redirect_output(log: Path) -> None:
    """Send what the frameworks print to a file: the terminal is for the table."""
    sys.stdout.flush()
    sys.stderr.flush()
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)


def _rank_main(rank: int, case: Case, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.world_size))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=case.world_size,
        timeout=TIMEOUT,
    )
    recorder = Recorder()
    case.run(recorder)
    torch.save(vars(recorder), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def last_error(text: str) -> str:
    """Return the last exception of a printed traceback, on one line."""
    lines = [line for line in text.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return lines[-1] if lines else " ".join(text.split())[-200:]


def _outcome(case: Case, folder: Path, *, log: str) -> Outcome:
    error, seconds = folder / "error", folder / "seconds"
    took = float(seconds.read_text()) if seconds.exists() else 0.0
    files = [folder / f"rank{rank}.pt" for rank in range(case.world_size)]
    if error.exists() or not all(file.exists() for file in files):
        note = error.read_text() if error.exists() else last_error(log)
        return Outcome([], note, failed=True, seconds=took)
    ranks = [torch.load(file, weights_only=True) for file in files]
    notes = dict.fromkeys(note for note in (case.note, *(r["note"] for r in ranks)) if note)
    snapshots = [rank["snapshots"] for rank in ranks]
    return Outcome(snapshots, "; ".join(notes), failed=False, seconds=took)


@dataclass(frozen=True)
class Measures:
    """How far a system is from what its schedule says; largest absolute values of elements.

    Attributes:
        drift: Movement in a phase of layer groups that were not to move in it.
        thawed: Movement of the layer group that moved least in the first phase it trained in,
            of those that were frozen before.
        disagreement: Difference between ranks, after any phase.
        difference: Difference to the reference after the last phase.
        first_difference: The same after the first phase: 0 before any change says that the system
            was given the same weights, rows and settings as the reference.
    """

    drift: float
    thawed: float | None
    disagreement: float
    difference: float
    first_difference: float


def measure(
    snapshots: Sequence[Sequence[Weights]],
    *,
    idle: Sequence[frozenset[str]],
    expected: Sequence[Weights],
    group_of: Callable[[str], str],
) -> Measures:
    """Return the measures of one system.

    Args:
        snapshots: By rank, then by phase, beginning before the first.
        idle: Layer groups that must not move, by phase.
        expected: The reference's snapshots.
        group_of: Layer group of a parameter.
    """
    drifts: list[float] = [0.0]
    thawed: dict[str, float] = {}
    for ranks in snapshots:
        waiting = {group_of(name) for name in ranks[0]}
        for phase, frozen in enumerate(idle):
            moved = _movement(ranks[phase], ranks[phase + 1], group_of=group_of)
            drifts += [m for group, m in moved.items() if group in frozen]
            for group in sorted(waiting - frozen):
                waiting.discard(group)
                if phase > 0:
                    thawed[group] = min(moved[group], thawed.get(group, float("inf")))
    return Measures(
        drift=max(drifts),
        thawed=min(thawed.values(), default=None),
        disagreement=max(
            (
                _difference(a, b)
                for ranks in snapshots
                for a, b in zip(snapshots[0], ranks, strict=True)
            ),
        ),
        difference=max(_difference(ranks[-1], expected[-1]) for ranks in snapshots),
        first_difference=max(_difference(ranks[1], expected[1]) for ranks in snapshots),
    )


def _movement(
    before: Weights, after: Weights, *, group_of: Callable[[str], str]
) -> dict[str, float]:
    moved: dict[str, float] = {}
    for name in before:
        distance = float((after[name] - before[name]).abs().max())
        moved[group_of(name)] = max(distance, moved.get(group_of(name), 0.0))
    return moved


def _difference(one: Weights, other: Weights) -> float:
    if one.keys() != other.keys():
        raise ValueError(f"different parameters: {sorted(one.keys() ^ other.keys())}")
    return max(float((one[name] - other[name]).abs().max()) for name in one)
