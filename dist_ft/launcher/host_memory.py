"""Whether the kernel has killed for want of host memory: its own count for this cgroup."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

ADVICE = (
    "lower train.micro_batch_size or the ranks of a node, raise engine.zero_stage, or ask for more "
    "memory (Slurm: --mem)"
)
# Where "no limit" begins: version 1 says it by a number of this size.
_NO_LIMIT = 2**60


def oom_kills(
    proc: Path = Path("/proc/self/cgroup"), *, root: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Return how often the kernel has killed in this cgroup, None where it does not say.

    Args:
        proc: Names the cgroups of this process.
        root: Where cgroups are mounted.
    """
    for folder in _folders(proc, root):
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError, ValueError):
                counts = dict(line.split() for line in (folder / name).read_text().splitlines())
                if "oom_kill" in counts:
                    return int(counts["oom_kill"])
    return None


def memory_limit(
    proc: Path = Path("/proc/self/cgroup"), *, root: Path = Path("/sys/fs/cgroup")
) -> str:
    """Return the limit of this cgroup in words, "" without one."""
    for folder in _folders(proc, root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                limit = int((folder / name).read_text())
                if limit < _NO_LIMIT:
                    return f" (the limit here is {limit / 2**30:.1f} GiB)"
    return ""


def _folders(proc: Path, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's memory cgroup, of version 2 and 1."""
    with contextlib.suppress(OSError):
        for line in proc.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            inside = path.lstrip("/")
            if controllers == "":
                yield root / inside
                yield root / "unified" / inside
            elif "memory" in controllers.split(","):
                yield root / "memory" / inside
