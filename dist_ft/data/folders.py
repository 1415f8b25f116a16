"""Folders that appear whole under their name, whoever is killed meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from dist_ft.data.manifest import fsync_folder


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock between processes, on one machine or a shared file system; it dies with them."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # Some clusters mount Lustre without locks: two nodes would write into one folder.
            raise RuntimeError(
                f"the file system of {path.parent} can't lock files ({error}): choose a data "
                "folder on another one, or mount it with locks (Lustre: -o flock)"
            ) from error
        yield


def restore_folder(folder: Path) -> None:
    """Puts right what a process killed while it replaced a folder left; none is at work now."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def replace_folder(folder: Path, *, by: Path) -> None:
    """Gives the finished folder `by` the name `folder`, durably, whatever has it now."""
    # A folder can't be renamed onto a full one, so the old one steps aside first.
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        folder.rename(old)
    by.rename(folder)
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
