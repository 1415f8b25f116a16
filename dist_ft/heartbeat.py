"""A rank's sign of life: what it does now, in a few bytes of memory that others can read.

A beat is a store into a mapped file: no system call, no lock, no collective. Whoever watches looks
whether the counter still moves, by its own clock, so clocks of ranks and nodes may differ or jump.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import hashlib
import math
import mmap
import os
import signal
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = "DIST_FT_HEARTBEATS"
_LAYOUT = struct.Struct("<Qqqd32s")
_SIZE = 4096
_REQUEST = "request"
# Free in torch, DeepSpeed and Slurm; Python writes the stacks even if another thread holds the GIL.
STACKS_SIGNAL = signal.SIGUSR2
# What a network file system answers while its server is away, and a disk that begins to fail.
_PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ENETDOWN, errno.ENETUNREACH, errno.ENOTCONN, errno.ESHUTDOWN,
}  # fmt: skip


@dataclass(frozen=True)
class Beat:
    """What a rank did when it was last heard of.

    Attributes:
        count: Beats so far; 0 before the first.
        step: Optimizer steps done.
        phase: Index of the phase, -1 before the first.
        timeout_s: Seconds that this section may take.
        section: Name of what it was doing.
    """

    count: int
    step: int
    phase: int
    timeout_s: float
    section: str


class Heartbeat:
    """Writes a rank's beats; without a folder it does nothing."""

    def __init__(self, path: Path | None) -> None:
        """Map the file at `path`."""
        self._count = 0
        self._map: mmap.mmap | None = None
        if path is not None:
            path.write_bytes(bytes(_SIZE))
            with path.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), _SIZE)

    @classmethod
    def of_this_rank(cls) -> Heartbeat:
        """Return the heartbeat that the launcher asked this process for, if it did."""
        folder = os.environ.get(FOLDER)
        return cls(None if folder is None else beat_file(Path(folder), _local_rank()))

    def beat(self, section: str, *, step: int, phase: int, timeout_s: float) -> None:
        """Say what this rank does now and how many seconds it may take."""
        if self._map is None:
            return
        self._count += 1
        body = _LAYOUT.pack(self._count, step, phase, timeout_s, section.encode()[:32])
        self._map[: _LAYOUT.size] = body


def beat_file(folder: Path, local_rank: int) -> Path:
    """Return where a rank of this node writes its beats."""
    return folder / f"rank{local_rank}.beat"


def stacks_file(folder: Path, local_rank: int) -> Path:
    """Return where a rank of this node writes its stacks."""
    return folder / f"rank{local_rank}.stacks"


def error_file(folder: Path, local_rank: int) -> Path:
    """Return where a rank of this node writes why it ends."""
    return folder / f"rank{local_rank}.error"


def read_beat(path: Path) -> Beat:
    """Return the last beat in a file; one of count 0 if there is none yet."""
    try:
        data = path.read_bytes()[: _LAYOUT.size]
    except FileNotFoundError:
        data = b""
    if len(data) < _LAYOUT.size:
        return Beat(0, 0, -1, 0.0, "start")
    count, step, phase, timeout_s, section = _LAYOUT.unpack(data)
    text = section.rstrip(b"\0").decode(errors="replace")
    return Beat(count, step, phase, timeout_s, text or "start")


def is_passing(error: BaseException) -> bool:
    """Return whether a disk or a network failed behind an error, which may be over soon."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _PASSING:
            return True
        cause = cause.__cause__
    return False


def error_text(error: BaseException) -> str:
    """Return an error on one line; what kind it is, unless its words are meant for the user."""
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | RuntimeError | OSError):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def noting_errors() -> Iterator[None]:
    """Note an error of the block, which must end before this rank leaves the others."""
    try:
        yield
    except Exception as error:
        note_error(error)
        raise


def note_error(error: BaseException) -> None:
    """Tell the launcher why this rank ends; of several ranks the first one is to blame.

    Only a rank's first error counts, with the time at which it was met: the others meet theirs
    when they find the connection to this rank broken.
    """
    folder = os.environ.get(FOLDER)
    if folder is None:
        return
    body = f"{time.monotonic()}\n{error_text(error)}"
    # Not there yet; and the rank ends by its own error, not by a full disk.
    with (
        contextlib.suppress(OSError),
        error_file(Path(folder), _local_rank()).open("x", encoding="utf-8") as file,
    ):
        file.write(body)


def is_first_to_tell(text: str) -> bool:
    """Return whether the user is to be told: no other rank of this node has met the same error."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        return True
    digest = hashlib.sha256(text.encode()).hexdigest()
    try:
        (Path(folder) / f"{digest}.told").touch(exist_ok=False)  # only one rank makes it
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def read_error(path: Path) -> tuple[float, str]:
    """Return when a rank met its error, by the node's monotonic clock, and what it was."""
    try:
        when, _, text = path.read_text(encoding="utf-8").partition("\n")
        return float(when), text
    except (FileNotFoundError, ValueError):
        return math.inf, ""


def note_request(folder: Path, number: int) -> None:
    """Leave word for the ranks which signal it was that the launcher passes on as another one."""
    with contextlib.suppress(OSError):  # a full disk must not keep a run from stopping
        (folder / _REQUEST).write_text(str(number))


def asked_by() -> int:
    """Return the number of the signal that the launcher was sent, 0 if it has not left word."""
    folder = os.environ.get(FOLDER)
    try:
        return 0 if folder is None else int((Path(folder) / _REQUEST).read_text())
    except (OSError, ValueError):
        return 0


def show_stacks_when_asked() -> None:
    """Let `STACKS_SIGNAL` write the stacks of all threads where the launcher looks for them."""
    folder = os.environ.get(FOLDER)
    if folder is not None:
        # Kept open for as long as the process lives: the handler writes to its descriptor.
        file = stacks_file(Path(folder), _local_rank()).open("w")
        faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
