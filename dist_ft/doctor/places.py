"""Where other software keeps its files on this machine, and on what kind of disk."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def extensions_folder() -> Path:
    """Return the folder in which torch compiles extensions; it need not be there.

    The rule is that of ``torch.utils.cpp_extension``, whose own function makes the folder.
    """
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given is not None:
        return Path(given)
    hip, cuda = torch.version.hip, torch.version.cuda
    device = f"rocm{hip}" if hip is not None else f"cu{cuda}" if cuda is not None else "cpu"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return Path(get_default_build_root()) / f"{python}_{device.replace('.', '')}"


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def file_system(folder: Path, *, mounts: str | None = None) -> tuple[str, str]:
    """Return the type and the options of the file system of a folder, empty where unknown.

    Args:
        folder: Need not be there yet.
        mounts: Text of ``/proc/mounts``; read by default.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/mounts").read_text()
        except OSError:
            return "", ""
    place = existing(folder).resolve()
    best, kind, options = -1, "", ""
    for line in mounts.splitlines():
        _, point, *more = line.split()
        if len(point) >= best and place.is_relative_to(point.replace("\\040", " ")):
            best, kind, options = len(point), *more[:2]
    return kind, options
