"""Checkpoints that exist or don't: written aside, hashed, renamed, and only then found.

A checkpoint is a folder ``step-00001000`` with one safetensors file per rank, ``trainer.json`` and
``manifest.json``. Every tensor is a run of one parameter's elements named
``kind|parameter|start``, so a checkpoint can be read by any world size and any ZeRO stage. Nothing
in it is pickled.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dist_ft import dist
from dist_ft.train.checkpoint_names import MANIFEST, checkpoints_by_step
from dist_ft.train.file_mode import follow_umask
from dist_ft.train.retention import Kept, Retention, worst_if_nan

log = logging.getLogger("dist_ft")

# Files of a checkpoint that are read at once to be verified.
_READERS = 8
FORMAT_VERSION = 1
TRAINER = "trainer.json"
_REPLACED = ".old-"
_DIGEST = "xxh3"
_MANIFEST_KEYS = {"format_version", "step", "files"}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or that this version cannot read."""


def write_rank_file(
    folder: Path, *, rank: int, tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], str | None]:
    """Write a rank's share and make it durable; return its manifest entry, or what went wrong."""
    path = folder / f"rank-{rank:05d}.safetensors"
    try:
        if bad := next((n for n, t in tensors.items() if not bool(torch.isfinite(t).all())), None):
            return {}, f"{bad.replace('|', ' of ', 1).partition('|')[0]} is not finite"
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
        follow_umask(path)
        _fsync(path)
        return {"file": path.name, **_fingerprint(path)}, None
    except (OSError, SafetensorError) as error:
        return {}, str(error)


def commit(
    temporary: Path,
    final: Path,
    *,
    step: int,
    trainer: Mapping[str, Any],
    files: list[dict[str, Any]],
) -> str | None:
    """Write the JSON files, make everything durable and give the folder its name.

    Called by rank 0 when every rank's file is durable. Returns what went wrong: also, that another
    rank has written where this one does not see it.
    """
    replaced = final.with_name(f"{_REPLACED}{final.name}")
    try:
        if damage := next((d for entry in files if (d := _size_damage(temporary, entry))), None):
            return f"rank 0: {damage}; is {final.parent} the same folder for all ranks?"
        _write_json(temporary / TRAINER, trainer)
        files = [*files, {"file": TRAINER, **_fingerprint(temporary / TRAINER)}]
        manifest = {"format_version": FORMAT_VERSION, "step": step, "files": files}
        _write_json(temporary / MANIFEST, {**manifest, _DIGEST: _digest(manifest)})
        _fsync(temporary)
        if final.exists():  # left by a run that went back to an earlier checkpoint
            final.rename(replaced)
        temporary.rename(final)
    except OSError as error:
        return _undo(replaced, error)
    try:
        _fsync(final.parent)
    except OSError as error:  # the new name may not outlive a loss of power
        with contextlib.suppress(OSError):
            final.rename(temporary)
        return _undo(replaced, error)
    shutil.rmtree(replaced, ignore_errors=True)
    return None


def _undo(replaced: Path, error: OSError) -> str:
    """Bring back the checkpoint that was to be replaced; return what went wrong."""
    with contextlib.suppress(OSError):
        _put_back(replaced)
    return f"rank 0: {error}"


def remove_old(root: Path, *, step: int, retention: Retention) -> None:
    """Remove what retention does not keep, now that the checkpoint of `step` exists.

    One that can't be read just now might be one that stays, so it does.
    """
    folders = checkpoints_by_step(root)
    whole, unread = _look(root)
    keep = retention.keeps(whole, newest=step) | unread
    for at, folder in folders:
        if at not in keep:
            # Without its manifest a folder is no checkpoint, even if removing it is cut short.
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def known_checkpoints(root: Path) -> list[Kept]:
    """Return what retention knows of the checkpoints that are there and can be read."""
    return _look(root)[0]


def _look(root: Path) -> tuple[list[Kept], set[int]]:
    """Return the checkpoints that are there, and the steps of those that can't be read."""
    known: list[Kept] = []
    unread: set[int] = set()
    for step, folder in checkpoints_by_step(root):
        try:
            kept = _kept(step, folder)
        except OSError as error:  # which says nothing of what is in it
            log.warning("%s cannot be read and is left alone: %s", folder.name, error)
            unread.add(step)
        else:
            if kept is not None:
                known.append(kept)
    return known, unread


def _kept(step: int, folder: Path) -> Kept | None:
    if not (folder / MANIFEST).is_file():
        return None
    try:
        trainer = json.loads((folder / TRAINER).read_text())
    except (FileNotFoundError, ValueError):
        return None
    # Checkpoints of earlier versions may have a NaN.
    scores = {name: worst_if_nan(score) for name, score in (trainer.get("scores") or {}).items()}
    return Kept(step, bool(trainer.get("ephemeral")), scores)


def set_aside(root: Path, names: list[str]) -> None:
    """Rename damaged checkpoints, so that they are neither found nor counted again.

    Also removes what a killed save left behind. Called by rank 0 while nobody saves.
    """
    for name in names:
        (root / name).rename(_free_name(root / f".damaged-{name}"))
    for leftover in (*root.glob(".tmp-step-*"), *root.glob(f"{_REPLACED}step-*")):
        shutil.rmtree(leftover, ignore_errors=True)


def find_checkpoint(root: Path, *, up_to: int | None = None) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose files are all there and unchanged, or None.

    Rank 0 looks and every rank gets its answer, so that all ranks resume alike. The second value
    says which newer ones were passed over, and why.

    Args:
        root: The run's ``checkpoints`` folder.
        up_to: Look only at those of this step and before.

    Raises:
        CheckpointError: On every rank, if another version of this package wrote what is newest.
    """
    found: tuple[str | None, list[str]] = (None, [])
    problem: str | None = None
    if dist.rank() == 0:
        try:
            found = _newest_whole(root, up_to=up_to)
        except CheckpointError as error:
            problem = str(error)
    (path, passed_over), problem = dist.broadcast_object((found, problem))
    if problem is not None:
        raise CheckpointError(problem)
    return (None if path is None else Path(path)), passed_over


def _newest_whole(root: Path, *, up_to: int | None) -> tuple[str | None, list[str]]:
    passed_over: list[str] = []
    for step, folder in reversed(checkpoints_by_step(root)):
        if up_to is not None and step > up_to:
            continue
        damage = verify_checkpoint(folder)
        if damage is None:
            return str(folder), passed_over
        passed_over.append(f"{folder.name}: {damage}")
    return None, passed_over


def put_back(root: Path) -> None:
    """Give a checkpoint its name back whose replacement was cut short between two renames.

    Called by rank 0 when a run is taken up, while nobody saves.
    """
    for old in root.glob(f"{_REPLACED}step-*"):
        _put_back(old)


def _put_back(old: Path) -> None:
    final = old.with_name(old.name.removeprefix(_REPLACED))
    if old.exists() and not final.exists():
        old.rename(final)


def verify_checkpoint(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None.

    Raises:
        CheckpointError: If nothing is wrong with its manifest, but this version cannot read it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return "it has no manifest: writing it was cut short"
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read ({error})"
    try:
        return _manifest_damage(manifest, folder) or _files_damage(folder, manifest["files"])
    except (AttributeError, KeyError, TypeError) as error:
        return f"its manifest is damaged ({type(error).__name__}: {error})"
    except OSError as error:  # of a disk that fails: an older checkpoint may be whole
        return f"it cannot be read ({error})"


def _manifest_damage(manifest: dict[str, Any], folder: Path) -> str | None:
    # Checkpoints of the first runs have no digest.
    digest = manifest.pop(_DIGEST, None)
    if digest not in (None, _digest(manifest)):
        return "its manifest was changed: its digest is another"
    version, unknown = manifest["format_version"], set(manifest) - _MANIFEST_KEYS
    if version == FORMAT_VERSION and not unknown:
        return None
    if digest is not None:  # whoever wrote it meant it so: that is no damage to be passed over
        raise CheckpointError(
            f"{folder} has format version {version}, this version of dist_ft reads "
            f"{FORMAT_VERSION}: use the version that wrote it. Nothing was changed"
        )
    said = "" if not unknown else f" and says {', '.join(sorted(unknown))}"
    return f"its manifest is damaged: it has format version {version}{said}"


def _files_damage(folder: Path, entries: Sequence[Mapping[str, Any]]) -> str | None:
    """Return what is wrong with the first file that is damaged.

    Several at once: all ranks wait for the answer, and one stream of a network disk is slow.
    """
    with ThreadPoolExecutor(max_workers=_READERS, thread_name_prefix="dist_ft-verify") as threads:
        found = threads.map(functools.partial(_file_damage, folder), entries)
        return next((damage for damage in found if damage), None)


def _file_damage(folder: Path, entry: Mapping[str, Any]) -> str | None:
    path = folder / entry["file"]
    if path.parent != folder:
        return f"its manifest names a file elsewhere: {entry['file']}"
    if damage := _size_damage(folder, entry):
        return damage
    if _fingerprint(path)["xxh3"] != entry["xxh3"]:
        return f"{path.name} was changed: its hash is not the manifest's"
    return None


def _size_damage(folder: Path, entry: Mapping[str, Any]) -> str | None:
    path = folder / entry["file"]
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{path.name} has {size} bytes, expected {entry['bytes']}"
    return None


@dataclass(frozen=True)
class _Run:
    start: int
    length: int
    key: str
    file: int


class CheckpointReader:
    """Reads a verified checkpoint piece by piece; a `StateSource` for any engine."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`, which `verify_checkpoint` has found whole."""
        self.folder = folder
        self.trainer: dict[str, Any] = json.loads((folder / TRAINER).read_text())
        manifest = json.loads((folder / MANIFEST).read_text())
        # Verified: none of the names leads out of the folder.
        names = [f["file"] for f in manifest["files"] if f["file"].endswith(".safetensors")]
        self._files = [safe_open(folder / name, framework="pt") for name in names]
        self._runs: dict[tuple[str, str], list[_Run]] = defaultdict(list)
        for index, file in enumerate(self._files):
            for key in file.keys():  # noqa: SIM118 - not a dict
                kind, parameter, start = key.split("|")
                length = file.get_slice(key).get_shape()[0]
                self._runs[kind, parameter].append(_Run(int(start), length, key, index))
        for runs in self._runs.values():
            runs.sort(key=lambda run: run.start)

    @property
    def steps(self) -> Mapping[str, int]:
        """Updates that each parameter group has had."""
        return self.trainer["steps"]

    @property
    def loss_scale(self) -> Mapping[str, float]:
        """The dynamic loss scale and its counters; empty if none was saved."""
        # Checkpoints of the first runs did not have it.
        return self.trainer.get("loss_scale", {})

    @property
    def averaged(self) -> Mapping[str, int]:
        """How many sets of weights are in each parameter group's average."""
        return self.trainer.get("averaged", {})

    def read(self, kind: str, parameter: str, *, start: int, length: int) -> Tensor | None:
        """Return `length` elements of a parameter's `kind`, or None if it was never saved."""
        parts: list[Tensor] = []
        position, end = start, start + length
        for run in self._runs.get((kind, parameter), []):
            first, last = max(position, run.start), min(end, run.start + run.length)
            if first >= last or first != position:
                continue
            piece = self._files[run.file].get_slice(run.key)
            parts.append(piece[first - run.start : last - run.start])
            position = last
        if position != end:
            return None
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def saved(self) -> set[tuple[str, str]]:
        """Return the kinds and parameters that are there."""
        return set(self._runs)

    def numel(self, parameter: str) -> int:
        """Return the number of elements that are saved of a parameter's weight."""
        return sum(run.length for run in self._runs.get(("weight", parameter), []))


def _free_name(path: Path) -> Path:
    """Return the path, with a number if it is taken: what was set aside before may be wanted."""
    numbered = (path.with_name(f"{path.name}.{n}") for n in itertools.count(1))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "xxh3": digest.hexdigest()}


def _digest(manifest: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def _write_json(path: Path, body: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(body, indent=1, sort_keys=True))
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
