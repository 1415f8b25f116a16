"""Prepare a split: raw rows -> selection -> features -> shards and manifest.

Memory is bounded by a few batches of raw rows and one shard, whatever the size of the source, plus
8 bytes per row for finding duplicates. A folder is written beside its place and renamed when
complete; it is used again as long as everything its rows depend on is the same.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from dist_ft.data.bad_rows import BadRows
from dist_ft.data.encoding import BatchEncoder, EncodedBatch, encode_batches
from dist_ft.data.files import Row, is_outage
from dist_ft.data.folders import locked, replace_folder, restore_folder
from dist_ft.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    canonical_json,
    differences,
    fingerprint,
    write_durably,
    write_manifest,
)
from dist_ft.data.schema import shard_schema
from dist_ft.data.selection import (
    RowFunctions,
    SelectionCounts,
    SplitPlan,
    select_rows,
)
from dist_ft.data.shards import TARGET_BYTES, ShardedDataset, ShardWriter

__all__ = ["PrepareSpec", "PreparedSplit", "RowFunctions", "SplitPlan", "prepare_split",
           "split_inputs"]  # fmt: skip

# A change of the rows of all tasks needs a new version: older folders are then not used again. What
# a task makes of its rows has a version of its own, `encoding_version`.
PREPARE_VERSION = 2
_PROGRESS_NAME = "progress.json"

_LOG = logging.getLogger(__name__)

# Which folders that were prepared differently may be replaced; see `prepare_split`.
Replacing = Literal["nothing", "settings", "anything"]


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
        raw_columns: columns of the raw rows to keep with the features, so that rows can be
            augmented when they are read: all that `encode` uses. None by default.
        shard_bytes: a shard is written as soon as it holds this many bytes.
    """

    task: str
    plan: SplitPlan
    functions: RowFunctions
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    on_error: Literal["stop", "skip"] = "stop"
    raw_columns: tuple[str, ...] = ()
    shard_bytes: int = TARGET_BYTES

    def raw_rows(self, split: str) -> Iterator[Row]:
        """Yields a split's raw rows as `encode` will get them, for finding the labels.

        Raises:
            ValueError: a source or column is absent, or a row is bad and not skipped.
        """
        bad_rows = self.bad_rows(split)
        for rows in select_rows(
            self.plan, split=split, functions=self.functions, bad_rows=bad_rows
        ):
            yield from rows

    def bad_rows(self, split: str) -> BadRows:
        """Returns what happens to the rows of a split that can't be used."""
        key = f"tasks.{self.task}.on_error"
        return BadRows(self.plan.source_of(split), skip=self.on_error == "skip", key=key)


@dataclass(frozen=True)
class PreparedSplit:
    """A prepared folder, its manifest, and whether it was there already."""

    folder: Path
    manifest: Manifest
    reused: bool


class PreparedDifferentlyError(ValueError):
    """A folder holds rows that depend on something else, and may not be replaced.

    Attributes:
        folder: the folder.
        stored: what its rows depend on, as `split_inputs` returns it.
        wanted: what they should depend on.
    """

    def __init__(
        self, text: str, *, folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]
    ) -> None:
        super().__init__(text)
        self.folder = folder
        self.stored = stored
        self.wanted = wanted


def split_folder(data_dir: Path, *, task: str, split: str) -> Path:
    """Returns the folder of a task's prepared split."""
    return data_dir / task / split


def prepare_split(
    spec: PrepareSpec,
    *,
    split: str,
    data_dir: Path,
    replacing: Replacing = "nothing",
    processes: int = 1,
    progress: Callable[[int], None] | None = None,
) -> PreparedSplit:
    """Prepares a task's split in <data_dir>/<task>/<split>, or uses what is there already.

    Several processes may call this at once: one works, the others wait and use its result. If it
    is killed, the next call goes on after the last complete shard; the result is the same, byte
    for byte, as it is for any number of encoding processes.

    Args:
        spec: what the rows depend on.
        split: the split to prepare.
        data_dir: the folder of all prepared data.
        replacing: which folders that were prepared differently are replaced instead of refused:
            `nothing`, `settings` (from another source or with other settings, but with this
            tokenizer) or `anything`.
        processes: how many processes encode; 1 is this one.
        progress: called after each batch with the number of raw rows read so far.

    Raises:
        PreparedDifferentlyError: the folder was prepared differently and `replacing` does not allow
            to replace it.
        ValueError: a source, column or row is bad; or no rows are left.
        RuntimeError: an encoding process died, or the file system can't lock files.
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    folder = split_folder(data_dir, task=spec.task, split=split)
    wanted = split_inputs(spec, split=split)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{split}.lock")):
        restore_folder(folder)
        found = _existing(folder, wanted=wanted, replacing=replacing)
        if found is not None:
            return PreparedSplit(folder, found, reused=True)
        temporary = folder.with_name(f".{split}.tmp")
        temporary.mkdir(exist_ok=True)
        try:
            manifest = _write(
                temporary,
                spec=spec,
                split=split,
                inputs=wanted,
                processes=processes,
                progress=progress,
            )
        except ValueError as error:
            # Bad data stay bad; after anything else, the next call goes on from here.
            if not is_outage(error):
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        replace_folder(folder, by=temporary)
        # Not before: if the folder can't get its name, the next call need not encode again.
        (folder / _PROGRESS_NAME).unlink(missing_ok=True)
    return PreparedSplit(folder, manifest, reused=False)


def split_inputs(spec: PrepareSpec, *, split: str) -> dict[str, Any]:
    """Returns what the rows depend on, as JSON; its hash decides whether a folder is used again.

    Raises:
        ValueError: a source can't be read.
    """
    plan = spec.plan
    # Absent unless used, so that folders prepared without it are found again.
    kept = {"raw_columns": list(spec.raw_columns)} if spec.raw_columns else {}
    needed = (split if split in plan.sources else "train", *plan.held_out(split))
    return {
        "task": spec.task,
        "split": split,
        "columns": {f.name: str(f.type) for f in _schema(spec)},
        "tokenizer": dict(spec.tokenizer),
        "preprocessing": {
            "version": PREPARE_VERSION,
            "arguments": {**spec.arguments, **kept, "on_error": spec.on_error},
        },
        "source": {
            "fractions": dict(plan.fractions) if split in ("train", *plan.fractions) else {},
            **{name: plan.source_of(name).fingerprint for name in needed},
        },
    }


def _schema(spec: PrepareSpec) -> pa.Schema:
    return shard_schema(spec.functions.schema, raw=bool(spec.raw_columns))


def _existing(folder: Path, *, wanted: Mapping[str, Any], replacing: Replacing) -> Manifest | None:
    """Returns the folder's manifest if it can be used, None if the folder is to be written."""
    if not folder.exists():
        return None
    if not (folder / MANIFEST_NAME).is_file() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} exists, but is no prepared data set ({MANIFEST_NAME} is missing): remove "
            "the folder or choose another data folder"
        )
    try:
        # As when it is opened: what is refused there must not be used again here.
        manifest = ShardedDataset(folder, verify="cached").manifest
    except ValueError:
        if replacing != "nothing":
            return None
        raise
    if manifest.input_fingerprint == fingerprint(wanted):
        return manifest
    # Another tokenizer means another model: its runs, perhaps one that trains just now, need what
    # is here. Other settings replace what the same user tried before.
    other_tokenizer = dict(manifest.tokenizer) != wanted["tokenizer"]
    if replacing == "anything" or (replacing == "settings" and not other_tokenizer):
        return None
    stored = {
        "task": manifest.task,
        "split": manifest.split,
        "columns": {f.name: str(f.type) for f in manifest.schema},
        "tokenizer": dict(manifest.tokenizer),
        "preprocessing": {k: manifest.preprocessing[k] for k in ("version", "arguments")},
        "source": dict(manifest.source),
    }
    text = (
        f"{folder} was prepared {'with another tokenizer' if other_tokenizer else 'differently'} "
        f"(prepared -> wanted): {'; '.join(differences(stored, wanted)[:8])}: choose another "
        "data_dir, or `dist-ft prepare --replace` if no other run needs what is there"
    )
    raise PreparedDifferentlyError(text, folder=folder, stored=stored, wanted=wanted)


def _write(
    folder: Path,
    *,
    spec: PrepareSpec,
    split: str,
    inputs: Mapping[str, Any],
    processes: int,
    progress: Callable[[int], None] | None,
) -> Manifest:
    """Writes the shards and the manifest, going on with what a killed process left."""
    schema = _schema(spec)
    writer = ShardWriter(folder, schema=schema, target_bytes=spec.shard_bytes)
    key = fingerprint({"inputs": inputs, "shard_bytes": spec.shard_bytes})
    done = _resumed(folder, writer=writer, key=key)
    counts = SelectionCounts()
    bad_rows = spec.bad_rows(split)
    bad_rows.count = done.refused
    selected = select_rows(
        spec.plan, split=split, functions=spec.functions, bad_rows=bad_rows, counts=counts
    )
    remaining = _reported(selected, first=done.batches, counts=counts, progress=progress)
    source = spec.plan.source_of(split).name
    encoder = BatchEncoder(spec.functions, schema, source, spec.raw_columns)
    # Closing it stops the processes, also after an error.
    with contextlib.closing(
        encode_batches(remaining, encoder=encoder, processes=processes)
    ) as encoded:
        for batch in encoded:
            for number, reason in batch.refused:
                bad_rows.refused(number, reason)
            done.add(batch)
            if batch.features is not None and writer.add_batch(batch.features):
                _save_progress(folder, done=done, writer=writer, key=key)
    counts.kept -= done.refused
    counts.invalid = bad_rows.count
    for line in bad_rows.summary():
        _LOG.warning("%s/%s: %s", spec.task, split, line)
    shards = writer.close()
    if not shards:
        raise ValueError(
            f"task {spec.task!r}: the split {split!r} is empty ({counts}): give more data "
            "or other fractions"
        )
    _save_progress(folder, done=done, writer=writer, key=key)
    manifest = Manifest(
        task=spec.task,
        split=split,
        schema=schema,
        shards=shards,
        length_histogram=writer.length_histogram(),
        tokenizer=inputs["tokenizer"],
        preprocessing={
            **inputs["preprocessing"],
            "rows_truncated": done.rows_truncated,
            "tokens_dropped": done.tokens_dropped,
        },
        source=inputs["source"],
        selection=counts.to_json(),
        input_fingerprint=fingerprint(inputs),
    )
    _check_totals(manifest)
    write_manifest(folder, manifest=manifest)
    return manifest


def _reported(
    selected: Iterator[list[Row]],
    *,
    first: int,
    counts: SelectionCounts,
    progress: Callable[[int], None] | None,
) -> Iterator[list[Row]]:
    """Yields the batches from number `first` on.

    Those before were encoded by a process that was killed. They are selected again, as the rows
    that follow depend on them, but that is quick: only encoding is not repeated.
    """
    for number, rows in enumerate(selected):
        if progress is not None:
            progress(counts.read)
        if number >= first:
            yield rows


@dataclass
class _Done:
    """What was encoded so far: batches of selected rows, and what the manifest counts."""

    batches: int = 0
    refused: int = 0
    rows_truncated: int = 0
    tokens_dropped: int = 0

    def add(self, batch: EncodedBatch) -> None:
        self.batches += 1
        self.refused += len(batch.refused)
        self.rows_truncated += batch.rows_truncated
        self.tokens_dropped += batch.tokens_dropped


def _save_progress(folder: Path, *, done: _Done, writer: ShardWriter, key: str) -> None:
    content = {"key": key, "done": asdict(done), "writer": writer.state()}
    write_durably(folder / _PROGRESS_NAME, content=canonical_json(content))


def _resumed(folder: Path, *, writer: ShardWriter, key: str) -> _Done:
    """Returns how far a killed process came with the same inputs; nothing if that is unusable."""
    path = folder / _PROGRESS_NAME
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] == key and writer.resume(content["writer"]):
            _LOG.info("going on with %s after %d shards", folder, len(content["writer"]["shards"]))
            return _Done(**content["done"])
    for leftover in folder.iterdir():
        leftover.unlink()
    return _Done()


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
