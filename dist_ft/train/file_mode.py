"""The mode of files that libraries make for their owner alone."""

from __future__ import annotations

import stat
from pathlib import Path


def follow_umask(path: Path) -> None:
    """Give a file the mode that a new one gets in its folder; safetensors makes it 0600.

    A process learns its umask only by changing it, which its other threads would feel; a new file
    also knows what the folder itself asks for.
    """
    probe = path.with_name(f".{path.name}.mode")
    probe.touch()
    try:
        path.chmod(stat.S_IMODE(probe.stat().st_mode))
    finally:
        probe.unlink()
