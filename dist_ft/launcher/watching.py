"""Finds ranks that no longer move, and says which one holds the others up."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_ft.heartbeat import (
    STACKS_SIGNAL,
    Beat,
    beat_file,
    read_beat,
    stacks_file,
)

_STACKS_WAIT_S = 1.0
# Where a rank is that waits for another one.
_WAITING = (
    "distributed_c10d.py", "deepspeed/comm/", "torch/distributed/rendezvous.py",
    "dist_ft/engine/exchange.py",
)  # fmt: skip


@dataclass(frozen=True)
class Hang:
    """A rank that did not move for longer than its section may take.

    Attributes:
        local_rank: The rank of this node that holds the others up.
        beat: The last that was heard of it.
        silent_s: Seconds since then.
        why: How it was told from those that only wait.
    """

    local_rank: int
    beat: Beat
    silent_s: float
    why: str


class Watch:
    """Looks at the beats of a node's ranks; times are this process's own, monotonic."""

    def __init__(self, folder: Path, *, ranks: int) -> None:
        """Watch `ranks` ranks that beat in `folder`."""
        self._folder = folder
        now = time.monotonic()
        self._last = [(0, now)] * ranks

    def beats(self) -> list[Beat]:
        """Return the last beat of every rank."""
        return [read_beat(beat_file(self._folder, r)) for r in range(len(self._last))]

    def overdue(self, running: Sequence[bool]) -> list[int]:
        """Return the running ranks whose section takes longer than it may."""
        now = time.monotonic()
        found: list[int] = []
        for rank, beat in enumerate(self.beats()):
            count, since = self._last[rank]
            if beat.count != count:
                self._last[rank] = (beat.count, now)
            elif running[rank] and count and now - since > beat.timeout_s:
                # Before its first beat a rank prepares data, for as long as that takes.
                found.append(rank)
        return found

    def explain(self, overdue: Sequence[int], *, pids: Sequence[int]) -> Hang:
        """Let all ranks write their stacks, and return the one that the others wait for.

        In a hang every rank stands still, most of them in a collective. The one to blame is
        stopped, or writes no stacks, or is not in a collective, or else has come least far.

        Args:
            overdue: Ranks that are overdue.
            pids: Process of every rank.
        """
        states = [_state(pid) for pid in pids]
        # D: in the kernel, as on a disk that does not answer. For a moment every rank is there.
        stopped = [r for r, s in enumerate(states) if s in "Tt" or (s == "D" and r in overdue)]
        for pid in pids:
            _ask_for_stacks(pid)
        stacks = self._collect(expected=len(pids) - len(stopped))
        beats, now = self.beats(), time.monotonic()
        silent = [r for r, text in enumerate(stacks) if not text]
        working = [r for r in overdue if stacks[r] and not _waits(stacks[r])]
        why = "it waits in a collective, as all ranks of this node do"
        if stopped:
            suspects, why = stopped, "its process is stopped"
        elif silent:
            suspects, why = silent, "it writes no stacks"
        elif working:
            suspects, why = working, "it is not in a collective"
        else:
            suspects = list(overdue)
        rank = min(suspects, key=lambda r: (beats[r].step, beats[r].count))
        return Hang(rank, beats[rank], now - self._last[rank][1], why)

    def _collect(self, *, expected: int) -> list[str]:
        """Return the stacks of every rank, waiting a moment for them to be written."""
        deadline = time.monotonic() + _STACKS_WAIT_S
        while True:
            texts = [_text(stacks_file(self._folder, r)) for r in range(len(self._last))]
            if sum(map(bool, texts)) >= expected or time.monotonic() > deadline:
                time.sleep(0.1)  # the last one may still be writing
                return [_text(stacks_file(self._folder, r)) for r in range(len(self._last))]
            time.sleep(0.02)


def _ask_for_stacks(pid: int) -> None:
    try:
        os.kill(pid, STACKS_SIGNAL)
    except ProcessLookupError:
        return


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def _waits(stacks: str) -> bool:
    """Return whether the main thread, the last one that is shown, is in a collective."""
    main = stacks.rpartition("\n\n")[2] or stacks
    return any(place in main for place in _WAITING)


def _state(pid: int) -> str:
    """Return the state letter of a process, "" if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return " "
    return text.rpartition(")")[2].split()[0]
