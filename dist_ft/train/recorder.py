"""The run's record: one JSON object per event in ``metrics.jsonl``, written by rank 0."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger("dist_ft")

# What a start comes to, and what says that one is under way.
_ENDINGS = ("end", "stop")
_WORK = ("resume", "start", "step")


class Tracker(Protocol):
    """Shows the events of a run somewhere else, see ``train.trackers``."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Take one event, as it stands in ``metrics.jsonl``."""
        ...

    def close(self, *, failed: bool = False) -> None:
        """Send what was not sent yet, and say whether the run has failed."""
        ...


class Recorder:
    """Appends events; a run that is resumed goes on in the same file."""

    def __init__(self, path: Path | None, *, trackers: Sequence[Tracker] = ()) -> None:
        """Open `path` for appending; None (every rank but 0) records nothing.

        Args:
            path: The file.
            trackers: Get every event too, as it is written.
        """
        self._began = time.monotonic()
        self._trackers: Sequence[Tracker] = trackers
        self._cut = False
        self._file: FileIO | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _mend(path)
            # Unbuffered: what could not be written must not be tried again with the next event.
            self._file = path.open("ab", buffering=0)

    def event(self, kind: str, *, step: int, **fields: Any) -> None:
        """Write an event with the seconds since this process began to record."""
        if self._file is None:
            return
        body = {"event": kind, "step": step, "time_s": round(time.monotonic() - self._began, 3)}
        body |= fields
        # What a full disk cut off stands on a line of its own, and nobody reads it.
        line = (("\n" if self._cut else "") + json.dumps(body) + "\n").encode()
        try:
            self._cut = self._file.write(line) != len(line)
        except OSError:
            self._cut = True
        if self._cut:
            log.error("step %d: the %s event is lost: the disk is full", step, kind)
        self._show(lambda tracker: tracker.event(body))

    def _show(self, action: Callable[[Tracker], None]) -> None:
        """Do something with every tracker; one that fails is left out, as the run needs none."""
        for tracker in self._trackers:
            try:
                action(tracker)
            except Exception as error:  # noqa: BLE001 - of a disk, a server, or their library
                name = type(tracker).__name__
                log.error(
                    "%s has failed and is left out: %s: %s", name, type(error).__name__, error
                )
                self._trackers = [other for other in self._trackers if other is not tracker]

    def close(self, *, failed: bool = False) -> None:
        """Close the file and the trackers, and tell those whether the run has failed."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._show(lambda tracker: tracker.close(failed=failed))
        self._trackers = ()


def _mend(path: Path) -> None:
    """End a line that a killed process left unfinished, so that the next event has its own."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a run's record, leaving out a line that was never finished."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(event, dict):
                yield event


def surviving_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of the run as it went in the end."""
    return surviving(read_events(path))


def surviving(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events that count in the end.

    Work that a crash undid was done again after the resume; its events are left out.
    """
    events: list[dict[str, Any]] = []
    for event in found:
        if event["event"] == "resume":
            events = [e for e in events if _happened(e, resumed_at=event["step"])]
        events.append(event)
    return events


def _happened(event: dict[str, Any], *, resumed_at: int) -> bool:
    """Return whether an event before a resume is part of the run as it went in the end.

    A phase that began right at the checkpoint is entered again, and says so again.
    """
    if event["step"] == resumed_at:
        return event["event"] != "phase"
    return event["step"] < resumed_at


def ending(events: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the ``end`` or ``stop`` that the last start has come to; None while it goes on.

    Evaluations and exports of a run may follow its end; only a new start undoes it.
    """
    for event in reversed(events):
        if event["event"] in _ENDINGS:
            return event
        if event["event"] in _WORK:
            return None
    return None
