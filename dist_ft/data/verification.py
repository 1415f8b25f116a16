"""Are the shard files what was written: sizes, hashes, and remembering what was checked."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import xxhash

from dist_ft.data.manifest import Manifest, ShardInfo

VerifyLevel = Literal["size", "cached", "hash"]

CACHE_NAME = ".verified.json"
_CACHE_VERSION = 1
# A file that changed this shortly before it was checked could change again within one tick of the
# file system's clock, which nobody would see: it is checked again next time, as in git's index.
_SETTLED_NS = 2 * 10**9
_PREPARE_AGAIN = "restore the file or prepare the data again"

# Inode, time of the last change in nanoseconds, bytes, and the hash that was found.
_Entry = tuple[int, int, int, str]


def check_files(folder: Path, *, manifest: Manifest, level: VerifyLevel) -> None:
    """Checks the shard files of a folder against its manifest.

    Args:
        folder: the folder.
        manifest: what it should hold.
        level: "size" compares the sizes; "hash" reads every byte; "cached" reads the files which
            changed since their bytes were last read, by inode, time and size, and remembers them
            in the folder.

    Raises:
        ValueError: the level is unknown, or a file is missing or not what was written.
    """
    if level not in ("size", "cached", "hash"):
        raise ValueError(f"verify must be 'size', 'cached' or 'hash', got {level!r}")
    # All sizes come before the first hash: a missing or cut file is found at once.
    for info in manifest.shards:
        _check_size(folder / info.file, expected=info.bytes)
    if level == "hash":
        for info in manifest.shards:
            _check_hash(folder / info.file, expected=info.xxh3_128)
    elif level == "cached":
        _check_changed(folder, manifest=manifest)


def hash_file(path: Path, *, algorithm: Callable[[], Any]) -> str:
    """Returns a file's hash in hex: xxh3_128 finds damage at disk speed, sha256 is identity."""
    state = algorithm()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            state.update(piece)
    return state.hexdigest()


def is_intact(folder: Path, *, info: ShardInfo) -> bool:
    """Returns whether a shard file is what was written."""
    path = folder / info.file
    return (
        path.is_file()
        and path.stat().st_size == info.bytes
        and hash_file(path, algorithm=xxhash.xxh3_128) == info.xxh3_128
    )


def _check_size(path: Path, *, expected: int) -> None:
    if not path.is_file():
        raise ValueError(f"shard {path} is missing: {_PREPARE_AGAIN}")
    if (size := path.stat().st_size) != expected:
        raise ValueError(f"shard {path} has {size} bytes, expected {expected}: {_PREPARE_AGAIN}")


def _check_hash(path: Path, *, expected: str) -> None:
    if (actual := hash_file(path, algorithm=xxhash.xxh3_128)) != expected:
        raise ValueError(
            f"shard {path} has the hash {actual}, expected {expected} (xxh3): {_PREPARE_AGAIN}"
        )


def _check_changed(folder: Path, *, manifest: Manifest) -> None:
    known = _read_cache(folder)
    checked: dict[str, _Entry] = {}
    for info in manifest.shards:
        path = folder / info.file
        before = _entry(path, info=info)
        if known.get(info.file) != before:
            now = time.time_ns()
            _check_hash(path, expected=info.xxh3_128)
            if _entry(path, info=info) != before or now - before[1] < _SETTLED_NS:
                continue
        checked[info.file] = before
    if checked != known:
        _write_cache(folder, entries=checked)


def _entry(path: Path, *, info: ShardInfo) -> _Entry:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size, info.xxh3_128


def _read_cache(folder: Path) -> dict[str, _Entry]:
    # Whatever is wrong with the cache, the files are simply read again.
    try:
        content = json.loads((folder / CACHE_NAME).read_text(encoding="utf-8"))
        if content["version"] != _CACHE_VERSION:
            return {}
        return {name: tuple(entry) for name, entry in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_cache(folder: Path, *, entries: dict[str, _Entry]) -> None:
    temporary = folder / f"{CACHE_NAME}.{uuid.uuid4().hex}.tmp"
    content = json.dumps({"version": _CACHE_VERSION, "files": entries})
    # Data may lie where this process can't write: then they are read again next time.
    with contextlib.suppress(OSError):
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(folder / CACHE_NAME)
