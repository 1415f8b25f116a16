"""Streaming readers of raw files: CSV, JSON, JSON lines, Parquet and Arrow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

Row = dict[str, Any]


class BadRow(NamedTuple):
    """A row that can't be read.

    Attributes:
        place: its file and line, or its number in the file, from 1.
        reason: what is wrong with it.
    """

    place: str
    reason: str

    def __str__(self) -> str:
        """Returns both in one line."""
        return f"{self.place}: {self.reason}"


def refusal(text: str, *, key: str = "on_error") -> str:
    """Returns the error about a row that can't be used, given the recipe's key that allows it."""
    return f"{text}: repair or remove the row, or leave bad rows out ({key}: skip)"


def is_outage(error: BaseException) -> bool:
    """Returns whether a disk or the network failed behind an error: the data may be good."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    return cause is not None


# Called with a row that can't be read; it raises, or counts and lets reading go on.
OnBadRow = Callable[[BadRow], None]

FORMATS = ("csv", "json", "jsonl", "parquet", "arrow")
SUFFIXES = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_BATCH_ROWS = 1000
# One CSV row must fit into one block; types are inferred from the first one.
_CSV_BLOCK_BYTES = 16 * 2**20
_ESTIMATED_FROM_BYTES = 2**20
# The marker that ends an Arrow stream: 0xFFFFFFFF and a length of 0.
_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def read_rows(path: Path, *, file_format: str, on_bad_row: OnBadRow) -> Iterator[Row]:
    """Yields a file's rows one by one, holding only a small piece of the file.

    The exception is a .json file with one array, which JSON can only read as a whole.

    Args:
        path: the file.
        file_format: one of FORMATS.
        on_bad_row: called for a JSON line that is no row, and for text that is not UTF-8; what
            else is wrong with a file of another format is raised for the whole file.

    Raises:
        ValueError: the file isn't in its format, naming file and line where known.
    """
    if file_format == "jsonl":
        return _json_lines(path, on_bad_row=on_bad_row)
    if file_format == "json":
        return _json(path, on_bad_row=on_bad_row)
    readers = {"csv": _csv, "parquet": _parquet, "arrow": _arrow}
    rows = _rows_of(readers[file_format](path), path=path, on_bad_row=on_bad_row)
    return _named_errors(path, rows=rows, file_format=file_format)


def estimate_rows(path: Path, *, file_format: str) -> int | None:
    """Returns about how many rows a file has, None where only reading all of it would tell.

    Args:
        path: the file.
        file_format: one of FORMATS.
    """
    try:
        if file_format == "parquet":
            with pyarrow.parquet.ParquetFile(path) as file:
                return file.metadata.num_rows
        if file_format not in ("jsonl", "csv"):
            return None
        with path.open("rb") as file:
            start = file.read(_ESTIMATED_FROM_BYTES)
    except (pa.ArrowException, OSError):
        return None  # reading says what is wrong
    return max(1, round(path.stat().st_size * start.count(b"\n") / max(1, len(start))))


def _named_errors(path: Path, *, rows: Iterator[Row], file_format: str) -> Iterator[Row]:
    try:
        yield from rows
    except (pa.ArrowException, OSError) as error:
        remedy = _csv_remedy(path, error) if file_format == "csv" else None
        remedy = remedy or f"repair the file, or set the source's format ({', '.join(FORMATS)})"
        raise ValueError(f"{path} can't be read as {file_format} ({error}): {remedy}") from error


def _csv_remedy(path: Path, error: Exception) -> str | None:
    """Return what to do about the usual faults of files that spreadsheets have written."""
    if "invalid UTF8" in str(error):
        return (
            "save it as UTF-8 (in Excel: CSV UTF-8; or, if it comes from Windows, "
            "iconv -f cp1252 -t utf-8)"
        )
    with path.open("rb") as file:
        header = file.readline(_ESTIMATED_FROM_BYTES)
    for separator, name in ((b";", "semicolons"), (b"\t", "tabs")):
        if separator in header and b"," not in header:
            return f"its columns are separated by {name}: save it with commas"
    return None


def _json(path: Path, *, on_bad_row: OnBadRow) -> Iterator[Row]:
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        yield from _json_lines(path, on_bad_row=on_bad_row)
        return
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): repair the file") from error
    for number, row in enumerate(rows, start=1):
        if isinstance(row, dict):
            yield row
        else:
            on_bad_row(BadRow(f"{path}, row {number}", _not_an_object(row)))


def _json_lines(path: Path, *, on_bad_row: OnBadRow) -> Iterator[Row]:
    return (row for _, row in json_lines(path, on_bad_row=on_bad_row))


def json_lines(path: Path, *, on_bad_row: OnBadRow) -> Iterator[tuple[int, Row]]:
    """Yields the rows of a file of JSON lines with the number of their line, from 1."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                on_bad_row(BadRow(place, f"not one JSON object in UTF-8 ({error})"))
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                on_bad_row(BadRow(place, _not_an_object(row)))


def _not_an_object(value: Any) -> str:
    kinds = {list: "an array", str: "a string", type(None): "null"}
    return f"{kinds.get(type(value), 'a number')} is not an object with columns"


def _csv(path: Path) -> Iterator[pa.RecordBatch]:
    reader = _open_csv(path, types={})
    names = reader.schema.names
    if len(set(names)) != len(names):
        raise ValueError(f"{path} has two columns with one name ({names}): rename one")
    # Only numbers and truth values are worth inferring: a text that looks like a date is a text,
    # and a column which is empty in the first block may hold anything later.
    others = [
        f.name for f in reader.schema if not (_is_plain(f.type) or pa.types.is_string(f.type))
    ]
    if others:
        reader = _open_csv(path, types=dict.fromkeys(others, pa.string()))
    yield from reader


def _is_plain(dtype: pa.DataType) -> bool:
    return pa.types.is_integer(dtype) or pa.types.is_floating(dtype) or pa.types.is_boolean(dtype)


def delimiter_of(path: Path) -> str:
    """Returns what separates the columns of a csv file, by its suffix."""
    return "\t" if path.suffix == ".tsv" else ","


def _open_csv(path: Path, *, types: dict[str, pa.DataType]) -> pyarrow.csv.CSVStreamingReader:
    return pyarrow.csv.open_csv(
        path,
        # One thread: only then do the error messages know the row.
        read_options=pyarrow.csv.ReadOptions(block_size=_CSV_BLOCK_BYTES, use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=delimiter_of(path), newlines_in_values=True
        ),
        convert_options=pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=False),
    )


def _parquet(path: Path) -> Iterator[pa.RecordBatch]:
    with pyarrow.parquet.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=_BATCH_ROWS)


def _arrow(path: Path) -> Iterator[pa.RecordBatch]:
    # Not mapped: a source that is cut while it is read must be an error, not a signal.
    with pa.OSFile(str(path)) as source:
        if source.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(source)
            yield from map(reader.get_batch, range(reader.num_record_batches))
            return
        size = source.size()
        source.seek(max(0, size - len(_STREAM_END)))
        # Arrow reads a stream that was cut between two messages as if it ended there.
        if source.read() != _STREAM_END:
            raise ValueError(
                f"{path} is an Arrow stream without its end marker, so it was cut: write it again"
            )
        source.seek(0)
        yield from pa.ipc.open_stream(source)


def _rows_of(
    batches: Iterator[pa.RecordBatch], *, path: Path, on_bad_row: OnBadRow
) -> Iterator[Row]:
    first = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            piece = batch.slice(start, _BATCH_ROWS)
            try:
                yield from piece.to_pylist()
            except UnicodeDecodeError:
                # Nothing has looked at the texts before, and one bad one hides all the others.
                yield from _readable(piece, first=first + start, path=path, on_bad_row=on_bad_row)
        first += batch.num_rows


def _readable(
    piece: pa.RecordBatch, *, first: int, path: Path, on_bad_row: OnBadRow
) -> Iterator[Row]:
    for place in range(piece.num_rows):
        try:
            (row,) = piece.slice(place, 1).to_pylist()
        except UnicodeDecodeError as error:
            on_bad_row(BadRow(f"{path}, row {first + place + 1}", f"not UTF-8 ({error})"))
        else:
            yield row
