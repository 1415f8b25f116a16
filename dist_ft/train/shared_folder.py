"""Looks whether all ranks have one run folder and the same data, before anything depends on it.

Every rank writes its share of a checkpoint into the run folder, and rank 0 gives the whole its
name. On disks of the nodes' own, a checkpoint would have all of its files nowhere.

Prepared data may lie on such disks, but every rank takes its share of one order of all rows: where
the rows differ, some would be lost and others seen twice.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from dist_ft import dist
from dist_ft.train.data import PreparedTask

# For so long NFS may believe that a name is not there which it looked up before (acdirmin).
_PATIENCE_S = 30.0
_LOOK_AGAIN_S = 0.2


def check_shared(folder: Path) -> None:
    """Check that every rank reads in `folder` what rank 0 has just written there.

    Every rank calls it, each with the path as that rank has it.

    Raises:
        ValueError: On every rank, if one doesn't find it, naming that rank and its node.
    """
    if not dist.is_distributed():
        return
    token = folder / f".shared-{secrets.token_hex(8)}"
    written: tuple[str, str | None] = (token.name, _write(token) if dist.rank() == 0 else None)
    name, problem = dist.broadcast_object(written)
    if problem is not None:
        raise ValueError(f"output_dir: rank 0 can't write into {folder} ({problem})")
    found = dist.all_gather_object((socket.gethostname(), _appears(folder / name, token=name)))
    if dist.rank() == 0:
        token.unlink(missing_ok=True)
    strangers = [f"rank {rank} on {host}" for rank, (host, sees) in enumerate(found) if not sees]
    if strangers:
        raise ValueError(
            f"output_dir: {folder} is not one folder for all ranks: {', '.join(strangers)} can't "
            f"read what rank 0 on {found[0][0]} has written there: put it on a disk that all nodes "
            "share, under the same path"
        )


def check_same_data(tasks: Sequence[PreparedTask], *, data_dir: Path) -> None:
    """Check that every rank has the same rows in each split.

    Every rank calls it, each with the data as that rank has them.

    Raises:
        ValueError: On every rank, if one has other rows than rank 0, naming that rank, its node
            and the splits.
    """
    own = {
        f"{t.task.name}/{split}": data.manifest.dataset_id
        for t in tasks
        for split, data in t.datasets.items()
    }
    found = dist.all_gather_object((socket.gethostname(), str(data_dir), own))
    host, place, wanted = found[0]
    others = [
        f"rank {rank} on {its_host} ({', '.join(different)})"
        for rank, (its_host, _, ids) in enumerate(found)
        if (different := _different(wanted, ids))
    ]
    if others:
        raise ValueError(
            f"data_dir: not all ranks have the rows that rank 0 on {host} has in {place}; others "
            f"are those of {', '.join(others)}: give all nodes the same raw files and prepare the "
            "data again, or put data_dir on a disk that all nodes share"
        )


def _different(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return [split for split in one | other if one.get(split) != other.get(split)]


def _write(token: Path) -> str | None:
    """Write the token; return what went wrong."""
    try:
        token.write_text(token.name)
    except OSError as error:
        return str(error)
    return None


def _appears(path: Path, *, token: str) -> bool:
    deadline = time.monotonic() + _PATIENCE_S
    while not _reads(path, token=token):
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_AGAIN_S)
    return True


def _reads(path: Path, *, token: str) -> bool:
    try:
        # Listing the folders makes NFS ask its server again for what they hold.
        for folder in (path.parent.parent, path.parent):
            next(folder.iterdir(), None)
        return path.read_text() == token
    except OSError:
        return False
