"""Folders that appear whole under their name, whoever is killed meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import secrets
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
    kept = folder.parent.glob(f"{glob.escape(old.name)}-*")
    for leftover in [old, *kept]:
        shutil.rmtree(leftover, ignore_errors=True)
    if old.exists():
        # NFS keeps files that a process has open, and another user's can't be removed: what stays
        # must not have the name that the next replacement needs.
        with contextlib.suppress(OSError):
            old.rename(old.with_name(f"{old.name}-{secrets.token_hex(4)}"))


def replace_folder(folder: Path, *, by: Path) -> None:
    """Gives the finished folder `by` the name `folder`, durably, whatever has it now."""
    # A folder can't be renamed onto a full one, so the old one steps aside first.
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        folder.rename(old)
    by.rename(folder)
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
