"""One shard, memory-mapped: numpy views on the buffers of its record batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from dist_ft.data.manifest import ShardInfo
from dist_ft.data.schema import column_kind

PREPARE_AGAIN = "restore the file or prepare the data again"


def open_batch(path: Path) -> pa.RecordBatch:
    """Returns the only record batch of a shard; its buffers keep the file mapped."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        count = reader.num_record_batches
        batch = reader.get_batch(0) if count else None
        if batch is not None:
            # A damaged header may name buffers that aren't there; touching them would crash.
            batch.validate()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"shard {path} can't be read as an Arrow file ({error}): {PREPARE_AGAIN}"
        ) from error
    if batch is None or count != 1:
        raise ValueError(f"shard {path} has {count} record batches, not 1: {PREPARE_AGAIN}")
    return batch


class MappedShard:
    """Numpy views on the buffers of one shard."""

    def __init__(self, path: Path, *, info: ShardInfo, schema: pa.Schema) -> None:
        batch = open_batch(path)
        if not batch.schema.equals(schema):
            raise ValueError(f"{path} has other columns than the manifest: {PREPARE_AGAIN}")
        self._path = path
        self._bytes = info.bytes
        self._inode = path.stat().st_ino
        self.scalars: dict[str, np.ndarray] = {}
        self.ragged: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._strings: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for field, column in zip(batch.schema, batch.columns, strict=True):
            kind = column_kind(field)
            if kind == "scalar":
                self.scalars[field.name] = column.to_numpy(zero_copy_only=True)
            elif kind == "ragged":
                values = column.values.to_numpy(zero_copy_only=True)
                self.ragged[field.name] = (_offsets(column, len(values), path), values)
            else:
                data = column.buffers()[2]
                text = np.frombuffer(data or b"", dtype=np.uint8)
                self._strings[field.name] = (_offsets(column, len(text), path), text)
        self._compare(info)

    def text(self, name: str, *, row: int) -> str:
        """Returns one row of a string column."""
        offsets, data = self._strings[name]
        try:
            return data[offsets[row] : offsets[row + 1]].tobytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self._path}, row {row} of the shard: column {name!r} is not UTF-8 ({error}): "
                f"{PREPARE_AGAIN}"
            ) from error

    def check_size(self) -> None:
        """Checks that the mapped file is as long as it was: reading past its end is no exception.

        It kills the process (SIGBUS). A file that was removed or replaced stays mapped as it was.

        Raises:
            ValueError: the file was cut.
        """
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return
        if status.st_ino == self._inode and status.st_size < self._bytes:
            raise ValueError(
                f"shard {self._path} was cut from {self._bytes} to {status.st_size} bytes while it "
                f"is in use: {PREPARE_AGAIN}"
            )

    def _compare(self, info: ShardInfo) -> None:
        """Compares the cheap numbers; catches two shards of one size which were swapped."""
        lengths, counts = self.scalars["length"], self.scalars["loss_count"]
        expected = (info.rows, info.tokens, info.min_length, info.max_length, info.loss_count)
        actual = (len(lengths), *length_stats(lengths), int(counts.sum(dtype=np.int64)))
        if actual != expected or not np.array_equal(np.diff(self.ragged["input_ids"][0]), lengths):
            raise ValueError(
                f"{self._path} doesn't hold the rows and lengths of the manifest (rows, tokens, "
                f"min, max, loss terms are {actual}, expected {expected}): {PREPARE_AGAIN}"
            )


def _offsets(column: pa.Array, size: int, path: Path) -> np.ndarray:
    """Returns a column's offsets, int32 [rows + 1], which are known to stay inside its values."""
    buffer = column.buffers()[1]
    offsets = np.frombuffer(buffer, dtype=np.int32, count=len(column) + 1)
    if offsets[0] < 0 or offsets[-1] > size or bool((np.diff(offsets) < 0).any()):
        raise ValueError(f"{path} has row offsets outside of its values: {PREPARE_AGAIN}")
    return offsets


def length_stats(lengths: np.ndarray) -> tuple[int, int, int]:
    """Returns tokens, shortest and longest row of rows with these lengths, int [rows]."""
    return int(lengths.sum(dtype=np.int64)), int(lengths.min()), int(lengths.max())
