"""Prepare a split: raw rows -> selection -> features -> shards and manifest.

Memory is bounded by a batch of raw rows and one shard, whatever the size of the source, plus 8
bytes per row for finding duplicates. A folder is written beside its place and renamed when
complete; it is used again as long as everything its rows depend on is the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dist_ft.data.files import Row
from dist_ft.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    differences,
    fingerprint,
    fsync_folder,
    write_manifest,
)
from dist_ft.data.schema import shard_schema
from dist_ft.data.selection import (
    BAD_ROW_ERRORS,
    BadRows,
    RowFunctions,
    SelectionCounts,
    SplitPlan,
    select_rows,
)
from dist_ft.data.shards import ShardedDataset, ShardWriter

__all__ = ["PrepareSpec", "PreparedSplit", "RowFunctions", "SplitPlan", "prepare_split"]

# Any change of what rows come out needs a new version: older folders are then not used again.
PREPARE_VERSION = 1
_TRUNCATED = "truncated_tokens"


@dataclass(frozen=True)
class PrepareSpec:
    """Everything that a task's prepared rows depend on.

    Attributes:
        task: the task's name.
        plan: where the splits come from.
        functions: the task's columns, keys and encoding.
        tokenizer: `tokenizer_fingerprint(tokenizer)`.
        arguments: whatever else changes the features (maximal length, labels, version of the
            encoding ...), as JSON.
        on_error: "stop" raises at the first bad row, "skip" counts and logs it.
    """

    task: str
    plan: SplitPlan
    functions: RowFunctions
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    on_error: Literal["stop", "skip"] = "stop"

    def raw_rows(self, split: str) -> Iterator[Row]:
        """Yields a split's raw rows as `encode` will get them, for finding the labels.

        Raises:
            ValueError: a source or column is absent, or a row is bad and not skipped.
        """
        bad_rows = BadRows(skip=self.on_error == "skip")
        for rows in select_rows(
            self.plan, split=split, functions=self.functions, bad_rows=bad_rows
        ):
            yield from rows


@dataclass(frozen=True)
class PreparedSplit:
    """A prepared folder, its manifest, and whether it was there already."""

    folder: Path
    manifest: Manifest
    reused: bool


def split_folder(data_dir: Path, *, task: str, split: str) -> Path:
    """Returns the folder of a task's prepared split."""
    return data_dir / task / split


def prepare_split(
    spec: PrepareSpec,
    *,
    split: str,
    data_dir: Path,
    rebuild: bool = False,
    progress: Callable[[int], None] | None = None,
) -> PreparedSplit:
    """Prepares a task's split in <data_dir>/<task>/<split>, or uses what is there already.

    Several processes may call this at once: one works, the others wait and use its result.

    Args:
        spec: what the rows depend on.
        split: the split to prepare.
        data_dir: the folder of all prepared data.
        rebuild: replace a folder which was prepared differently, instead of raising.
        progress: called after each batch with the number of raw rows read so far.

    Raises:
        ValueError: a source, column or row is bad; no rows are left; or the folder was prepared
            differently and `rebuild` is False.
    """
    folder = split_folder(data_dir, task=spec.task, split=split)
    wanted = _inputs(spec, split=split)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_name(f".{split}.lock")):
        _remove_leftovers(folder)
        found = _existing(folder, wanted=wanted, rebuild=rebuild)
        if found is not None:
            return PreparedSplit(folder, found, reused=True)
        temporary = folder.with_name(f".{split}.tmp")
        temporary.mkdir()
        try:
            manifest = _write(temporary, spec=spec, split=split, inputs=wanted, progress=progress)
            _replace(folder, by=temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return PreparedSplit(folder, manifest, reused=False)


def _inputs(spec: PrepareSpec, *, split: str) -> dict[str, Any]:
    """Returns what the rows depend on, as JSON; its hash decides whether a folder is used again."""
    plan = spec.plan
    needed = (split if split in plan.sources else "train", *plan.held_out(split))
    return {
        "task": spec.task,
        "split": split,
        "columns": {f.name: str(f.type) for f in shard_schema(spec.functions.schema)},
        "tokenizer": dict(spec.tokenizer),
        "preprocessing": {
            "version": PREPARE_VERSION,
            "arguments": {**spec.arguments, "on_error": spec.on_error},
        },
        "source": {
            "fractions": dict(plan.fractions) if split in ("train", *plan.fractions) else {},
            **{name: plan.source_of(name).fingerprint for name in needed},
        },
    }


def _existing(folder: Path, *, wanted: Mapping[str, Any], rebuild: bool) -> Manifest | None:
    """Returns the folder's manifest if it can be used, None if the folder is to be written."""
    if not folder.exists():
        return None
    if not (folder / MANIFEST_NAME).is_file() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} exists, but is no prepared data set ({MANIFEST_NAME} is missing): remove "
            "the folder or choose another data folder"
        )
    try:
        manifest = ShardedDataset(folder, verify="size").manifest
    except ValueError:
        if rebuild:
            return None
        raise
    if manifest.input_fingerprint == fingerprint(wanted):
        return manifest
    if rebuild:
        return None
    stored = {
        "task": manifest.task,
        "split": manifest.split,
        "columns": {f.name: str(f.type) for f in manifest.schema},
        "tokenizer": dict(manifest.tokenizer),
        "preprocessing": {k: manifest.preprocessing[k] for k in ("version", "arguments")},
        "source": dict(manifest.source),
    }
    raise ValueError(
        f"{folder} was prepared differently (prepared -> wanted): "
        f"{'; '.join(differences(stored, wanted)[:8])}: prepare it again with rebuild, or choose "
        "another data folder"
    )


def _write(
    folder: Path,
    *,
    spec: PrepareSpec,
    split: str,
    inputs: Mapping[str, Any],
    progress: Callable[[int], None] | None,
) -> Manifest:
    schema = shard_schema(spec.functions.schema)
    writer = ShardWriter(folder, schema=schema)
    counts = SelectionCounts()
    bad_rows = BadRows(skip=spec.on_error == "skip")
    encoder = _Encoder(spec, source=spec.plan.source_of(split).name, bad_rows=bad_rows)
    for rows in select_rows(
        spec.plan, split=split, functions=spec.functions, bad_rows=bad_rows, counts=counts
    ):
        writer.add(encoder.encode(rows))
        if progress is not None:
            progress(counts.read)
    counts.kept -= encoder.refused
    counts.invalid = bad_rows.count
    shards = writer.close()
    if not shards:
        raise ValueError(
            f"task {spec.task!r}: the split {split!r} is empty after preparation ({_show(counts)}):"
            " give more data or other fractions"
        )
    manifest = Manifest(
        task=spec.task,
        split=split,
        schema=schema,
        shards=shards,
        length_histogram=writer.length_histogram(),
        tokenizer=inputs["tokenizer"],
        preprocessing={
            **inputs["preprocessing"],
            "rows_truncated": encoder.rows_truncated,
            "tokens_dropped": encoder.tokens_dropped,
        },
        source=inputs["source"],
        selection=counts.to_json(),
        input_fingerprint=fingerprint(inputs),
    )
    _check_totals(manifest)
    write_manifest(folder, manifest=manifest)
    return manifest


def _show(counts: SelectionCounts) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.to_json().items())


def _check_totals(manifest: Manifest) -> None:
    place = f"task {manifest.task!r}, split {manifest.split!r}"
    if manifest.loss_count == 0:
        raise ValueError(
            f"{place}: no row has a loss term, so nothing can be learnt: check the labels and "
            "whether truncation cuts all of them"
        )
    vocab_size = manifest.tokenizer.get("vocab_size")
    if vocab_size is not None and manifest.max_token_id >= vocab_size:
        raise ValueError(
            f"{place}: token id {manifest.max_token_id} is outside of the tokenizer's vocabulary "
            f"of {vocab_size}: encode() must use this tokenizer"
        )


class _Encoder:
    """Encodes batches of raw rows, finds the bad row of a batch and counts truncation."""

    def __init__(self, spec: PrepareSpec, *, source: str, bad_rows: BadRows) -> None:
        self._encode = spec.functions.encode
        self._source = source
        self._bad_rows = bad_rows
        self.refused = 0
        self.rows_truncated = 0
        self.tokens_dropped = 0

    def encode(self, rows: list[Row]) -> list[dict[str, Any]]:
        """Returns the features of a batch with their lengths."""
        if not rows:
            return []
        try:
            features = self._encode(rows)
        except BAD_ROW_ERRORS:
            features = self._one_by_one(rows)
        numbers = {row["source_row"] for row in rows}
        return [self._finish(feature, numbers=numbers) for feature in features]

    def _one_by_one(self, rows: list[Row]) -> Sequence[dict[str, Any]]:
        features: list[dict[str, Any]] = []
        for row in rows:
            try:
                features.extend(self._encode([row]))
            except BAD_ROW_ERRORS as error:
                place = f"{self._source}, row {row['source_row']} (counted from 0)"
                self._bad_rows(f"{place}: {error}", cause=error)
                self.refused += 1
        return features

    def _finish(self, feature: dict[str, Any], *, numbers: set[int]) -> dict[str, Any]:
        if feature.get("source_row") not in numbers:
            raise ValueError(
                f"encode() gave a feature the source_row {feature.get('source_row')!r}, which is "
                "no row of its batch: take it from the raw row's 'source_row'"
            )
        dropped = feature.get(_TRUNCATED, 0)
        self.rows_truncated += dropped > 0
        self.tokens_dropped += dropped
        finished = {key: value for key, value in feature.items() if key != _TRUNCATED}
        finished["length"] = len(finished["input_ids"])
        return finished


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds a lock between processes, on one machine or a shared file system; it dies with them."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_leftovers(folder: Path) -> None:
    """Puts right what a killed process left; the lock says that none is at work."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(folder.with_name(f".{folder.name}.tmp"), ignore_errors=True)


def _replace(folder: Path, *, by: Path) -> None:
    # A folder can't be renamed onto a full one, so the old one steps aside first.
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        folder.rename(old)
    by.rename(folder)
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
