"""Where the rows of a file are, as an editor shows it; looked up when a row is to be named."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from dist_ft.data.files import BadRow, delimiter_of, json_lines, read_rows


def find_places(
    files: Sequence[Path], *, file_format: str, rows: Collection[int], name: str
) -> dict[int, str]:
    """Returns the place of each row: its file and line, or its number in the file, from 1.

    The files are read once, up to the last of the rows.

    Args:
        files: a source's files.
        file_format: one of FORMATS.
        rows: numbers of rows that could be read, from 0, over all files.
        name: what the source is called, where a row is not found again.
    """
    found: dict[int, str] = {}
    last = max(rows, default=-1)
    for number, (path, place) in enumerate(_all(files, file_format=file_format)):
        if number in rows:
            found[number] = f"{path}, {place}"
        if number >= last:
            break
    note = " (the header not counted)" if file_format == "csv" else ""
    return {row: found.get(row, f"{name}, row {row + 1}{note}") for row in rows}


def _all(files: Sequence[Path], *, file_format: str) -> Iterator[tuple[Path, str]]:
    for path in files:
        try:
            for place in _of_file(path, file_format=file_format):
                yield path, place
        except csv.Error:  # a text beyond csv's own limit: the numbers of later rows are unknown
            return


def _of_file(path: Path, *, file_format: str) -> Iterator[str]:
    if file_format == "csv":
        yield from (f"line {line}" for line in _csv_lines(path))
    elif file_format == "jsonl":
        yield from (f"line {line}" for line, _ in json_lines(path, on_bad_row=_ignore))
    else:
        rows = read_rows(path, file_format=file_format, on_bad_row=_ignore)
        yield from (f"row {number}" for number, _ in enumerate(rows, start=1))


def _csv_lines(path: Path) -> Iterator[int]:
    """Yields the line on which each row begins; texts may have line breaks of their own."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter_of(path))
        before, is_header = 0, True
        for row in reader:
            if row and not is_header:
                yield before + 1
            is_header = is_header and not row  # empty lines are no rows
            before = reader.line_num


def _ignore(row: BadRow) -> None:
    """Leaves a row out that has no number."""
    del row
