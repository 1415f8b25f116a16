"""Runs the ranks of this node until they are done; restarts them when one fails or hangs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

from dist_ft.heartbeat import FOLDER, error_file, note_request, read_error, stacks_file
from dist_ft.launcher.host_memory import ADVICE, memory_limit, oom_kills
from dist_ft.launcher.output import Log
from dist_ft.launcher.processes import STOPPING, Process, StartRank, is_left_alone
from dist_ft.launcher.settings import LaunchSettings
from dist_ft.launcher.watching import Watch

DONE, FAILED, BAD_INPUT, PREEMPTED, REPLANNED = 0, 1, 2, 75, 76
# Asked to stop, as by SIGTERM, and not all ranks ended well: what was saved before is all there is.
STOPPED = 128 + signal.SIGTERM
ATTEMPT, FAILURE = "DIST_FT_ATTEMPT", "DIST_FT_FAILURE"
# What a rank ends with that was asked to stop a second time; see `train.signals`.
AT_ONCE = {128 + number for number in STOPPING}
_POLL_S = 0.02
_LOOK_S = 0.1
# A rank whose peer has died learns it from the broken connection and says so in its log.
_LAST_WORDS_S = 3.0
# Each plan is half of the one before, so a run has few; a program that always ends so has more.
_MOST_REPLANS = 64
# Ranks of other nodes that belong to the failed attempt must be gone before the next one meets.
_PAUSE_S = 3.0


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended.

    Attributes:
        rank: The rank that failed first.
        reason: What happened to it, in words.
        section: What it was doing.
        step: Optimizer steps that it had done.
        signalled: Whether a signal ended it; otherwise it ended by itself.
        replanned: Whether it asked for another start, with less in memory at once.
        stopped: Whether the signal was one that asks to stop.
    """

    rank: int
    reason: str
    section: str
    step: int
    signalled: bool
    replanned: bool = False
    stopped: bool = False

    def to_json(self) -> str:
        """Return it for the ranks that are started next."""
        return json.dumps({name: v for name, v in asdict(self).items() if name != "stopped"})


@dataclass
class _Attempt:
    """The ranks of one attempt."""

    number: int
    processes: list[Process]
    watch: Watch
    folder: Path
    oom_kills: int | None = field(default_factory=oom_kills)
    codes: list[int | None] = field(default_factory=list)
    hang: Failure | None = None

    def running(self) -> list[bool]:
        """Look who still runs."""
        self.codes = [process.poll() for process in self.processes]
        return [code is None for code in self.codes]

    def send(self, number: int) -> None:
        """Send a signal to the ranks that run."""
        for process, runs in zip(self.processes, self.running(), strict=True):
            if runs:
                os.kill(process.pid, number)


class Supervisor:
    """Starts the ranks of this node, watches them and starts them again."""

    def __init__(
        self,
        settings: LaunchSettings,
        *,
        start: Callable[[int], StartRank],
        say: Callable[[str], None],
        logs: Path | None = None,
    ) -> None:
        """Prepare; `run` comes next.

        Args:
            settings: How many ranks, where, and how often again.
            start: From the number of an attempt, from 0, to what starts its ranks.
            say: Tells the user.
            logs: Folder for ``supervisor.log`` and the stacks of a hang.
        """
        self._settings = settings
        self._start = start
        self._say_to_user = say
        self._log = Log(logs)
        self._asked = 0
        self._asked_by = 0
        self._asked_at = 0.0

    def run(self) -> int:
        """Run until the ranks are done, or have failed once too often; return the exit code."""
        with self._listening():
            last: Failure | None = None
            number = restarts = replans = 0
            while True:
                start = self._start(number)
                if self._asked:  # nobody runs: what is saved is all there is
                    return PREEMPTED
                code, failure = self._run_attempt(number, start=start, before=last)
                if failure is None:
                    return code
                replans += failure.replanned
                restarts += not failure.replanned or replans > _MOST_REPLANS
                goes_on = not self._asked and restarts <= self._settings.max_restarts
                self._tell(failure, number=number, goes_on=goes_on)
                if self._asked:
                    # The signal came to the rank itself, before it listened: nothing is wrong, and
                    # what is saved is all there is. A smaller plan can wait, too.
                    return PREEMPTED if failure.stopped or failure.replanned else STOPPED
                if _same_way(failure, last):
                    self._say("failed twice in the same way: not started again")
                    return FAILED
                if not goes_on:
                    return FAILED
                last = failure
                number += 1
                if self._settings.place.nodes > 1:
                    time.sleep(_PAUSE_S)

    def _run_attempt(
        self, number: int, *, start: StartRank, before: Failure | None
    ) -> tuple[int, Failure | None]:
        with tempfile.TemporaryDirectory(prefix="dist_ft-") as name:
            attempt = self._begin(number, start=start, folder=Path(name), before=before)
            try:
                return self._follow(attempt)
            finally:
                attempt.send(signal.SIGKILL)
                for process in attempt.processes:
                    while process.poll() is None:
                        time.sleep(_POLL_S)

    def _begin(
        self, number: int, *, start: StartRank, folder: Path, before: Failure | None
    ) -> _Attempt:
        shared = {**self._settings.rendezvous(), FOLDER: str(folder), ATTEMPT: str(number)}
        if before is not None:
            shared[FAILURE] = before.to_json()
        ranks = range(self._settings.ranks)
        processes = [start({**shared, **self._settings.of_rank(rank)}) for rank in ranks]
        return _Attempt(number, processes, Watch(folder, ranks=len(processes)), folder)

    def _follow(self, attempt: _Attempt) -> tuple[int, Failure | None]:
        """Return how the attempt ends: an exit code, or a failure that may be tried again."""
        passed_on, looked_at = 0, 0.0
        while any(running := attempt.running()):
            passed_on = self._pass_on(attempt, already=passed_on)
            failure = self._first_failure(attempt)
            now = time.monotonic()
            if failure is None and now - looked_at > _LOOK_S:
                looked_at = now
                failure = self._find_hang(attempt, running)
            if failure is None and self._asked and now - self._asked_at > self._settings.grace_s:
                self._say(f"the ranks did not end within {self._settings.grace_s:g} s: killed")
                return STOPPED, None
            if failure is not None:
                self._wait(attempt, seconds=_LAST_WORDS_S)
                return self._verdict(attempt, self._first_failure(attempt) or failure)
            time.sleep(_POLL_S)
        failure = self._first_failure(attempt)
        if failure is not None:
            return self._verdict(attempt, failure)
        return (PREEMPTED if PREEMPTED in attempt.codes else DONE), None

    def _verdict(self, attempt: _Attempt, failure: Failure) -> tuple[int, Failure | None]:
        """Bad input is the same next time; whatever one rank refuses is refused for all."""
        attempt.running()
        if BAD_INPUT in attempt.codes and not failure.signalled:
            return BAD_INPUT, None
        return FAILED, failure

    def _wait(self, attempt: _Attempt, *, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while any(attempt.running()) and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _first_failure(self, attempt: _Attempt) -> Failure | None:
        """Return the rank that failed first; the others only followed.

        A killed one says nothing itself; NCCL aborts those that wait for another.
        """
        if attempt.hang is not None:
            return attempt.hang
        bad = [r for r, c in enumerate(attempt.codes) if c not in (None, DONE, PREEMPTED)]
        if not bad:
            return None

        def order(rank: int) -> tuple[bool, bool, float]:
            code = attempt.codes[rank] or 0
            followed = code > 0 or code == -signal.SIGABRT
            # Others see that the connection to one that ended at once is broken.
            return code not in AT_ONCE, followed, self._error(attempt, rank)[0]

        return self._describe(attempt, min(bad, key=order))

    def _error(self, attempt: _Attempt, rank: int) -> tuple[float, str]:
        return read_error(error_file(attempt.folder, rank))

    def _describe(self, attempt: _Attempt, rank: int) -> Failure:
        code, beat = attempt.codes[rank] or 0, attempt.watch.beats()[rank]
        text = self._error(attempt, rank)[1]
        reason = f"ended with exit code {code}{f' ({text[:300]})' if text else ''}"
        if code in AT_ONCE:
            reason += " (asked to stop a second time)"
        if code < 0:
            reason = f"was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            reason += f" ({self._why_killed(attempt)})"
        return Failure(
            self._global(rank), reason, beat.section, beat.step,
            signalled=code < 0, replanned=code == REPLANNED, stopped=-code in STOPPING,
        )  # fmt: skip

    def _why_killed(self, attempt: _Attempt) -> str:
        """Return who sends SIGKILL, as far as the kernel's own count of it says so."""
        if (oom_kills() or 0) > (attempt.oom_kills or 0):
            return f"by the kernel: host memory ran out{memory_limit()}; {ADVICE}"
        return f"if nobody did it, host memory ran out: {ADVICE}"

    def _find_hang(self, attempt: _Attempt, running: Sequence[bool]) -> Failure | None:
        overdue = attempt.watch.overdue(running)
        if not overdue:
            return None
        hang = attempt.watch.explain(overdue, pids=[p.pid for p in attempt.processes])
        attempt.send(signal.SIGKILL)  # a stopped process hears nothing else
        self._keep_stacks(attempt)
        reason = f"hung for {hang.silent_s:.1f} s ({hang.why})"
        attempt.hang = Failure(
            self._global(hang.local_rank), reason, hang.beat.section, hang.beat.step, signalled=True
        )
        return attempt.hang

    def _keep_stacks(self, attempt: _Attempt) -> None:
        ranks = range(self._settings.ranks)
        self._log.keep(
            (stacks_file(attempt.folder, r), f"rank{self._global(r)}.stacks") for r in ranks
        )

    def _global(self, local_rank: int) -> int:
        return self._settings.place.node_rank * self._settings.ranks + local_rank

    def _tell(self, failure: Failure, *, number: int, goes_on: bool) -> None:
        then = "starting again" if goes_on else "no restarts left"
        if self._asked:
            then = "not started again: a stop was asked for"
        self._say(
            f"rank {failure.rank} {failure.reason}, at step {failure.step} in section "
            f"{failure.section}; attempt {number}, {then}"
        )

    def _say(self, text: str) -> None:
        self._log.write(text)
        with contextlib.suppress(OSError):  # nobody reads it any more
            self._say_to_user(text)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        numbers = [number for number in STOPPING if not is_left_alone(number)]
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - handler
        self._asked += 1
        self._asked_by = self._asked_by or number
        self._asked_at = self._asked_at or time.monotonic()

    def _pass_on(self, attempt: _Attempt, *, already: int) -> int:
        """Tell the ranks of every request once; they tell one request from two themselves."""
        if self._asked > already:
            note_request(attempt.folder, self._asked_by)
            attempt.send(signal.SIGUSR1)
        return self._asked


def _same_way(one: Failure, other: Failure | None) -> bool:
    """Return whether a rank ended by itself at the same step again: that is no accident."""
    return (
        other is not None
        and not one.signalled
        and not other.signalled
        and not one.replanned
        and (one.rank, one.step, one.section) == (other.rank, other.step, other.section)
    )
