"""One shard file: where its columns lie, and reading rows of them with `pread`.

Nothing is read through a memory map of the file. Where a mapped file was cut (or its disk fails)
the kernel kills the process with SIGBUS, which no check beforehand can rule out; a read that comes
back short is an error with shard and row.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dist_ft.data.manifest import ShardInfo
from dist_ft.data.schema import column_kind

PREPARE_AGAIN = "restore the file or prepare the data again"

_Int64Array = npt.NDArray[np.int64]

# Arrow's description of a file stands before its only batch and after it. It takes some hundred
# bytes for each column.
_DESCRIPTION_BYTES = 2**20


def open_batch(path: Path) -> pa.RecordBatch:
    """Returns the only record batch of a shard, read into memory."""
    try:
        with pa.OSFile(str(path)) as file:
            return _only_batch(pa.ipc.open_file(file), path=path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, reason=error) from error


def _only_batch(reader: pa.ipc.RecordBatchFileReader, *, path: Path) -> pa.RecordBatch:
    if (count := reader.num_record_batches) != 1:
        raise ValueError(f"shard {path} has {count} record batches, not 1: {PREPARE_AGAIN}")
    batch = reader.get_batch(0)
    # A damaged header may name buffers that aren't there; touching them would crash.
    batch.validate()
    return batch


def _unreadable(path: Path, *, reason: object) -> ValueError:
    return ValueError(f"shard {path} can't be read as an Arrow file ({reason}): {PREPARE_AGAIN}")


def _open(path: Path) -> int:
    """Returns an open file, raising this process's limit of open files if it is reached."""
    try:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            # Often 1,024 by default, which is not many shards; up to the hard limit is allowed.
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        many = error.errno in (errno.EMFILE, errno.ENFILE)
        remedy = "raise the limit of open files (ulimit -Hn)" if many else PREPARE_AGAIN
        raise ValueError(f"shard {path} can't be opened ({error}): {remedy}") from error


@dataclass(frozen=True)
class _Array:
    """An array in the file: its first byte, its length and the type of its elements."""

    start: int
    count: int
    dtype: np.dtype

    @property
    def end(self) -> int:
        return self.start + self.count * self.dtype.itemsize


class ShardFile:
    """The columns of one shard, read from the file when they are asked for.

    The file stays open, so one that is removed or replaced in use stays readable as it was.

    Args:
        path: the file.
        info: what the manifest says about it.
        schema: its columns.

    Attributes:
        path: the file.
        descriptor: the open file.
        values: for each list and string column, the first byte of its values in the file.
        dtypes: the type of these values.

    Raises:
        ValueError: the file isn't what the manifest says.
    """

    def __init__(self, path: Path, *, info: ShardInfo, schema: pa.Schema) -> None:
        self.path = path
        self.descriptor = _open(path)
        weakref.finalize(self, os.close, self.descriptor)
        self._bytes = info.bytes
        self._numbers: dict[str, _Array] = {}
        self._values: dict[str, _Array] = {}
        self._locate(schema)
        self.values = {name: array.start for name, array in self._values.items()}
        self.dtypes = {name: array.dtype for name, array in self._values.items()}
        self._compare(info)

    def numbers(self, name: str) -> np.ndarray:
        """Returns a number column, [rows], or the offsets of a list or string column, [rows + 1].

        Raises:
            ValueError: the file was cut, or offsets don't stay inside the column's values.
        """
        array = self._numbers[name]
        content = self.read(array.start, array.end - array.start, what=f"column {name!r}")
        numbers = np.frombuffer(content, dtype=array.dtype)
        if name in self._values and (
            numbers[0] < 0
            or numbers[-1] > self._values[name].count
            or bool((np.diff(numbers) < 0).any())
        ):
            raise ValueError(f"{self.path} has row offsets outside of its values: {PREPARE_AGAIN}")
        return numbers

    def all_values(self, name: str) -> np.ndarray:
        """Returns the values of all rows of a list column, one row after the other."""
        array = self._values[name]
        content = self.read(array.start, array.end - array.start, what=f"column {name!r}")
        return np.frombuffer(content, dtype=array.dtype)

    def read(self, start: int, count: int, *, what: str) -> bytes:
        """Returns so many bytes of the file.

        Args:
            start: the first byte.
            count: how many.
            what: what they are, for the error.

        Raises:
            ValueError: the file was cut, or the disk fails.
        """
        pieces: list[bytes] = []
        try:
            while count:
                piece = os.pread(self.descriptor, count, start)
                if not piece:
                    raise ValueError(
                        f"shard {self.path} was cut from {self._bytes} to "
                        f"{os.fstat(self.descriptor).st_size} bytes while it is in use ({what} "
                        f"can't be read): {PREPARE_AGAIN}"
                    )
                pieces.append(piece)
                start, count = start + len(piece), count - len(piece)
        except OSError as error:
            raise ValueError(
                f"shard {self.path} can't be read at byte {start} ({what}; {error}): check the "
                f"disk, then {PREPARE_AGAIN}"
            ) from error
        return b"".join(pieces)

    def _locate(self, schema: pa.Schema) -> None:
        """Finds where the columns lie in the file, of which only the description is read.

        Arrow is given memory of the file's size that holds the description and else nothing (zeros
        that take no room until they are touched); where it places a buffer there, the buffer is in
        the file.
        """
        size = os.fstat(self.descriptor).st_size
        if size != self._bytes:
            raise ValueError(
                f"shard {self.path} has {size} bytes, expected {self._bytes}: {PREPARE_AGAIN}"
            )
        region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for start in {0, max(0, size - _DESCRIPTION_BYTES)}:
            count = min(_DESCRIPTION_BYTES, size - start)
            region[start : start + count] = self.read(start, count, what="the description")
        memory = pa.py_buffer(region)
        try:
            batch = _only_batch(pa.ipc.open_file(pa.BufferReader(memory)), path=self.path)
            if not batch.schema.equals(schema):
                raise ValueError(
                    f"{self.path} has other columns than the manifest: {PREPARE_AGAIN}"
                )
            for field, column in zip(batch.schema, batch.columns, strict=True):
                self._add_column(field, column=column, region=memory)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(self.path, reason=error) from error

    def _add_column(self, field: pa.Field, *, column: pa.Array, region: pa.Buffer) -> None:
        if column.null_count:
            raise _unreadable(self.path, reason=f"column {field.name!r} has nulls")
        kind = column_kind(field)
        buffers = column.buffers()
        rows = len(column)
        if kind == "scalar":
            dtype = np.dtype(field.type.to_pandas_dtype())
            self._numbers[field.name] = self._array(buffers[1], region, dtype=dtype, count=rows)
            return
        offsets = np.dtype(np.int32)
        self._numbers[field.name] = self._array(buffers[1], region, dtype=offsets, count=rows + 1)
        if kind == "ragged":
            dtype = np.dtype(field.type.value_type.to_pandas_dtype())
            count = len(column.values)
        else:
            dtype, count = np.dtype(np.uint8), buffers[-1].size if buffers[-1] else 0
        self._values[field.name] = self._array(buffers[-1], region, dtype=dtype, count=count)

    def _array(
        self, buffer: pa.Buffer | None, region: pa.Buffer, *, dtype: np.dtype, count: int
    ) -> _Array:
        if buffer is None or not count:
            return _Array(0, 0, dtype)
        array = _Array(buffer.address - region.address, count, dtype)
        if array.start < 0 or array.end > region.size or buffer.size < array.end - array.start:
            raise _unreadable(self.path, reason="a buffer lies outside of the file")
        return array

    def _compare(self, info: ShardInfo) -> None:
        """Compares the cheap numbers; catches two shards of one size which were swapped."""
        lengths, counts = self.numbers("length"), self.numbers("loss_count")
        expected = (info.rows, info.tokens, info.min_length, info.max_length, info.loss_count)
        if len(lengths) == info.rows > 0:
            actual = (len(lengths), *length_stats(lengths), int(counts.sum(dtype=np.int64)))
            if actual == expected and np.array_equal(np.diff(self.numbers("input_ids")), lengths):
                return
        raise ValueError(
            f"{self.path} doesn't hold the rows and lengths of the manifest ({info.rows} rows, "
            f"{info.tokens} tokens, {info.loss_count} loss terms): {PREPARE_AGAIN}"
        )


class RowReader:
    """Reads rows of list and string columns from all shards of a data set.

    Args:
        files: the shards, in row order.
    """

    def __init__(self, files: Sequence[ShardFile]) -> None:
        self._files = files
        self._descriptors = np.array([file.descriptor for file in files], dtype=np.int64)
        self._firsts = {
            name: np.array([file.values[name] for file in files], dtype=np.int64)
            for name in files[0].values
        }

    def read(
        self,
        name: str,
        *,
        rows: _Int64Array,
        numbers: _Int64Array,
        spans: tuple[_Int64Array, _Int64Array],
    ) -> list[bytes]:
        """Returns the bytes of each row.

        Args:
            name: the column.
            rows: each row's number in the data set, for the error, int64 [n].
            numbers: the number of each row's shard, int64 [n].
            spans: where each row's values start and end, in bytes from the first of the shard's
                column, int64 [n] each.

        Raises:
            ValueError: a shard was cut since it was opened, or the disk fails.
        """
        sizes = spans[1] - spans[0]
        firsts = self._firsts[name][numbers] + spans[0]
        wanted = (self._descriptors[numbers].tolist(), sizes.tolist(), firsts.tolist())
        try:
            # No Python code runs for a row here: this is much of what a sample costs.
            found = list(map(os.pread, *wanted))
        except OSError:
            found = []
        if sum(map(len, found)) == int(sizes.sum()):
            return found
        # Once more, slowly: this finds the row, and goes on after a read that was only interrupted.
        return [
            self._files[number].read(first, size, what=f"row {row} of the data")
            for number, first, size, row in zip(
                numbers.tolist(), firsts.tolist(), sizes.tolist(), rows.tolist(), strict=True
            )
        ]


def length_stats(lengths: np.ndarray) -> tuple[int, int, int]:
    """Returns tokens, shortest and longest row of rows with these lengths, int [rows]."""
    return int(lengths.sum(dtype=np.int64)), int(lengths.min()), int(lengths.max())
