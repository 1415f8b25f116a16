"""Shards: uncompressed Arrow IPC files with one record batch each, and their reader.

Rows are read straight from the values buffers in the files, by one `pread` a row and column that is
called from C. `pyarrow.Table.take` on list columns is about fifty times slower, and worker
processes cost more than they save.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from dist_ft.data.features import to_record_batch
from dist_ft.data.manifest import (
    Manifest,
    ShardInfo,
    fsync_folder,
    read_manifest,
    write_manifest,
)
from dist_ft.data.schema import column_kind
from dist_ft.data.shard_file import (
    PREPARE_AGAIN,
    RowReader,
    ShardFile,
    length_stats,
    open_batch,
)
from dist_ft.data.verification import VerifyLevel, check_files, hash_file, is_intact

__all__ = [
    "Columns",
    "Manifest",
    "ShardInfo",
    "ShardWriter",
    "ShardedDataset",
    "read_manifest",
    "to_record_batch",
    "verify",
    "write_manifest",
]

# ragged column -> one view a row; scalar column -> array [rows]; string column -> one str a row
Columns = dict[str, list[np.ndarray] | np.ndarray | list[str]]

_Int64Array = npt.NDArray[np.int64]

TARGET_BYTES = 64 * 2**20
_HISTOGRAM_WIDTH = 8


class ShardWriter:
    """Writes features into the shards of a folder, holding at most about one shard in memory.

    Args:
        folder: an existing, empty folder.
        schema: the columns, from `shard_schema`.
        target_bytes: a shard is written as soon as it holds this many bytes.
    """

    def __init__(
        self, folder: Path, *, schema: pa.Schema, target_bytes: int = TARGET_BYTES
    ) -> None:
        self._folder = folder
        self._schema = schema
        self._target_bytes = target_bytes
        self._pending: list[pa.RecordBatch] = []
        self._pending_bytes = 0
        self._shards: list[ShardInfo] = []
        self._length_counts = np.zeros(0, dtype=np.int64)

    def add(self, features: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows, each with exactly the columns of the schema.

        Raises:
            ValueError: a column is missing, unknown, null or doesn't fit its type; a row has no
                tokens, or a negative token id or loss count.
        """
        if features:
            self.add_batch(to_record_batch(features, schema=self._schema))

    def add_batch(self, batch: pa.RecordBatch) -> bool:
        """Adds rows that `to_record_batch` made, and returns whether all rows are on disk now."""
        self._pending.append(batch)
        self._pending_bytes += batch.nbytes
        if self._pending_bytes < self._target_bytes:
            return False
        self._flush()
        return True

    def state(self) -> dict[str, Any]:
        """Returns, as JSON, what `resume` needs to go on after the shards written so far."""
        return {
            "shards": [asdict(shard) for shard in self._shards],
            "length_counts": self._length_counts.tolist(),
        }

    def resume(self, state: Mapping[str, Any]) -> bool:
        """Goes on after the shards of a state, and returns whether they are all there and whole.

        Files that don't belong to it are removed; if a shard is damaged, nothing is changed.
        """
        shards = [ShardInfo(**shard) for shard in state["shards"]]
        if not all(is_intact(self._folder, info=shard) for shard in shards):
            return False
        known = {shard.file for shard in shards}
        for path in [*self._folder.glob("shard-*.arrow"), *self._folder.glob(".shard-*.tmp")]:
            if path.name not in known:
                path.unlink()
        self._shards = shards
        self._length_counts = np.array(state["length_counts"], dtype=np.int64)
        return True

    def close(self) -> tuple[ShardInfo, ...]:
        """Writes what is left and returns the shards in row order."""
        self._flush()
        return tuple(self._shards)

    def length_histogram(self) -> dict[str, Any]:
        """Returns how many rows have a length of [i * width, (i + 1) * width) tokens."""
        return {"width": _HISTOGRAM_WIDTH, "counts": self._length_counts.tolist()}

    def _flush(self) -> None:
        if not self._pending:
            return
        batch = pa.Table.from_batches(self._pending).combine_chunks().to_batches()[0]
        self._pending, self._pending_bytes = [], 0
        self._count_lengths(batch.column("length").to_numpy())
        temporary = self._folder / f".shard-{len(self._shards):05d}.tmp"
        with temporary.open("wb") as file:
            with pa.ipc.new_file(file, self._schema) as writer:
                writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        written = open_batch(temporary)
        written.validate(full=True)
        if not written.equals(batch):
            raise RuntimeError(f"{temporary} reads back differently: check the disk")
        info = _shard_info(temporary, batch=batch, index=len(self._shards))
        temporary.rename(self._folder / info.file)
        fsync_folder(self._folder)
        self._shards.append(info)

    def _count_lengths(self, lengths: npt.NDArray[np.int32]) -> None:
        counts = np.bincount(lengths // _HISTOGRAM_WIDTH, minlength=len(self._length_counts))
        counts[: len(self._length_counts)] += self._length_counts
        self._length_counts = counts


class ShardedDataset:
    """The rows of a prepared folder.

    Args:
        folder: a folder which `prepare_split` wrote.
        verify: "size" compares file sizes, rows and lengths with the manifest; "hash" also reads
            every byte and compares the hashes; "cached" does so for files which changed since that
            was last done.

    Attributes:
        folder: the folder.
        manifest: what the folder holds.
        lengths: tokens of each row, int32 [rows].
        loss_counts: loss terms of each row, int32 [rows].

    Raises:
        ValueError: the manifest or a shard is missing or not what was written, naming the file.
    """

    def __init__(self, folder: Path, *, verify: VerifyLevel) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        check_files(self.folder, manifest=self.manifest, level=verify)
        self._shards = [
            ShardFile(self.folder / info.file, info=info, schema=self.manifest.schema)
            for info in self.manifest.shards
        ]
        counts = np.array([info.rows for info in self.manifest.shards], dtype=np.int64)
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self._rows = RowReader(self._shards)
        self._kinds = {field.name: column_kind(field) for field in self.manifest.schema}
        # Whole columns of numbers and offsets, joined when they are first used: looking rows up
        # shard by shard would cost more than reading them.
        self._dtypes = self._shards[0].dtypes
        self._joined: dict[str, np.ndarray] = {}
        self.lengths = self._whole("length")
        self.loss_counts = self._whole("loss_count")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(
        self, rows: npt.NDArray[np.int64], *, columns: Collection[str] | None = None
    ) -> Columns:
        """Returns columns of the rows, in the order asked for.

        Args:
            rows: row numbers, int64 [n]; repeats allowed.
            columns: the columns to read, all by default.

        Returns:
            By column name: for a list column one read-only numpy array a row, for a number column
            an array [n], for a string column a list of str.

        Raises:
            ValueError: a row number is out of range, a string isn't UTF-8, a shard was cut since it
                was opened, or the disk fails.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (int(rows.min()) < 0 or int(rows.max()) >= len(self)):
            raise ValueError(
                f"rows must lie in [0, {len(self)}), got {int(rows.min())} to {int(rows.max())} "
                f"for {self.folder}"
            )
        numbers = np.searchsorted(self._ends, rows, side="right")
        taken: Columns = {}
        for name, kind in self._kinds.items():
            if columns is not None and name not in columns:
                continue
            if kind == "ragged":
                content = self._content(name, rows=rows, numbers=numbers)
                dtype = self._dtypes[name]
                taken[name] = [np.frombuffer(row, dtype) for row in content]
            elif kind == "string":
                content = self._content(name, rows=rows, numbers=numbers)
                taken[name] = self._texts(name, content=content, rows=rows, numbers=numbers)
            else:
                taken[name] = self._whole(name)[rows]
        return taken

    def _whole(self, name: str) -> np.ndarray:
        """Returns a number column, [rows], or the offsets of another, [rows + shards]."""
        if name not in self._joined:
            joined = np.concatenate([shard.numbers(name) for shard in self._shards])
            joined.flags.writeable = False
            self._joined[name] = joined
        return self._joined[name]

    def _content(self, name: str, *, rows: _Int64Array, numbers: _Int64Array) -> list[bytes]:
        """Returns rows of a list or string column, given the number of each row's shard."""
        offsets = self._whole(name)
        # Each shard has one offset more than rows.
        firsts = rows + numbers
        size = self._dtypes[name].itemsize
        spans = (
            offsets[firsts].astype(np.int64) * size,
            offsets[firsts + 1].astype(np.int64) * size,
        )
        return self._rows.read(name, rows=rows, numbers=numbers, spans=spans)

    def _texts(
        self, name: str, *, content: Sequence[bytes], rows: _Int64Array, numbers: _Int64Array
    ) -> list[str]:
        texts = []
        for place, text in enumerate(content):
            try:
                texts.append(text.decode())
            except UnicodeDecodeError as error:
                number = int(numbers[place])
                raise ValueError(
                    f"{self._shards[number].path}, row {rows[place] - self._starts[number]} of the "
                    f"shard: column {name!r} is not UTF-8 ({error}): {PREPARE_AGAIN}"
                ) from error
        return texts

    def scalar(self, name: str) -> np.ndarray:
        """Returns a whole number column, [rows].

        Raises:
            ValueError: there is no such column.
        """
        if self._kinds.get(name) != "scalar":
            raise ValueError(f"{self.folder} has no number column {name!r}: prepare the data again")
        return self._whole(name)

    def row_of_largest_token(self, shard: int) -> int:
        """Returns the first row that holds the largest token id of a shard, given its number."""
        file = self._shards[shard]
        offsets, ids = file.numbers("input_ids"), file.all_values("input_ids")
        place = int(ids[offsets[0] : offsets[-1]].argmax()) + int(offsets[0])
        local = int(np.searchsorted(offsets, place, side="right")) - 1
        return int(self._starts[shard]) + local

    def shard_of(self, row: int) -> str:
        """Returns the name of the shard file which holds a row."""
        return self.manifest.shards[int(np.searchsorted(self._ends, row, side="right"))].file


def verify(folder: Path, *, vocab_size: int | None = None) -> Manifest:
    """Checks every byte of a prepared folder and returns its manifest.

    Args:
        folder: a folder which `prepare_split` wrote.
        vocab_size: entries of the model's embedding; every token id must be smaller.

    Raises:
        ValueError: a file is missing, has another size or hash, holds invalid Arrow data, or a
            token id is outside of the vocabulary.
    """
    dataset = ShardedDataset(folder, verify="hash")
    for number, info in enumerate(dataset.manifest.shards):
        path = dataset.folder / info.file
        batch = open_batch(path)
        try:
            batch.validate(full=True)
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"shard {path} is not valid Arrow data ({error}): {PREPARE_AGAIN}"
            ) from error
        actual = _shard_info(path, batch=batch, index=0)
        if replace(actual, file=info.file) != info:
            raise ValueError(f"{path} doesn't hold what the manifest says: {PREPARE_AGAIN}")
        if vocab_size is not None and info.max_token_id >= vocab_size:
            raise ValueError(
                f"{path}, row {dataset.row_of_largest_token(number)} of the data, holds token id "
                f"{info.max_token_id}, but the vocabulary has {vocab_size} entries: prepare the "
                "data with this model's tokenizer"
            )
    return dataset.manifest


def _shard_info(path: Path, *, batch: pa.RecordBatch, index: int) -> ShardInfo:
    tokens, shortest, longest = length_stats(batch.column("length").to_numpy())
    xxh3_128 = hash_file(path, algorithm=xxhash.xxh3_128)
    return ShardInfo(
        file=f"shard-{index:05d}-{xxh3_128[:8]}.arrow",
        bytes=path.stat().st_size,
        rows=batch.num_rows,
        tokens=tokens,
        loss_count=int(batch.column("loss_count").to_numpy().sum(dtype=np.int64)),
        min_length=shortest,
        max_length=longest,
        max_token_id=int(batch.column("input_ids").flatten().to_numpy().max()),
        xxh3_128=xxh3_128,
        sha256=hash_file(path, algorithm=hashlib.sha256),
    )
