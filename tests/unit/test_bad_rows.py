"""Bad rows are named once, where an editor shows them, and counted by what is wrong."""

import json
import logging
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft.data.bad_rows import BadRows
from dist_ft.data.files import read_rows
from dist_ft.data.places import find_places
from dist_ft.data.prepare import prepare_split
from dist_ft.data.sources import SourceSpec, open_source
from tests.unit.test_data_prepare import make_spec

CELLS = st.text(st.sampled_from('ab ,"\n\r'), max_size=6)


def _quoted(text: str) -> str:
    doubled = text.replace('"', '""')
    return f'"{doubled}"'


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8), data=st.data())
def test_a_row_of_csv_is_on_the_line_where_it_was_written(
    rows: list[tuple[str, str]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    text, lines = "one,two" + end, []
    for row in rows:
        text += end * data.draw(st.integers(0, 2))  # empty lines are no rows
        lines.append(len(re.findall(r"\r\n|\r|\n", text)) + 1)
        text += ",".join(map(_quoted, row)) + end
    path.write_bytes(data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + text.encode())
    read = list(read_rows(path, file_format="csv", on_bad_row=lambda _: None))
    assert [tuple(row.values()) for row in read] == rows
    found = find_places([path], file_format="csv", rows=range(len(rows)), name="a.csv")
    assert found == {n: f"{path}, line {line}" for n, line in enumerate(lines)}


def test_rows_of_several_files_are_in_their_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 0}\nbroken\n\n{"n": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"n": 2}\n')
    source = open_source(SourceSpec("*.jsonl"), base_dir=tmp_path)
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert source.places([1, 2]) == {1: f"{a}, line 4", 2: f"{b}, line 1"}
    pyarrow.parquet.write_table(pa.table({"n": [5, 6]}), tmp_path / "c.parquet")
    source = open_source(SourceSpec("c.parquet"), base_dir=tmp_path)
    assert source.places([1]) == {1: f"{tmp_path / 'c.parquet'}, row 2"}
    assert open_source(SourceSpec("some/hub-set"), base_dir=tmp_path).places([4]) == {
        4: "some/hub-set, row 5"
    }


def test_a_row_behind_a_text_that_csv_refuses_has_a_number(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "x" * 200_000 + "\nlast\n")
    found = find_places([path], file_format="csv", rows=[1], name="a.csv")
    assert found == {1: "a.csv, row 2 (the header not counted)"}


def test_rows_left_out_are_told_by_reason_and_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": f"text {n}", "label": n % 2} for n in range(40)]
    for n in (3, 5, 8, 13):
        rows[n]["text"] = " "
    rows[21]["label"] = 7
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    spec = make_spec(tmp_path, {"train": SourceSpec("a.jsonl")}, on_error="skip",
                     fractions={"validation": 0.5})  # fmt: skip
    assert len(list(spec.raw_rows("train"))) > 5  # as a scan for labels reads them
    counts = [
        prepare_split(spec, split=split, data_dir=tmp_path / "d").manifest.selection
        for split in ("train", "validation")
    ]
    said = sorted(r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert len(said) == 3
    place = f"{path}, line"
    assert any(
        f"train: left out 4 rows: column 'text' is blank ({place} 4; {place} 6; {place} 9; ...)"
        in s
        for s in said
    )
    assert any(f"left out 1 row: label 7 is unknown ({place} 22)" in s for s in said)
    assert any("left out 1 row: not one JSON object" in s and f"({place} 41)" in s for s in said)
    # Each bad row is counted in one split, and every row of the source in both.
    assert counts[0]["invalid"] + counts[1]["invalid"] == 6
    assert all(sum(c.values()) - c["read"] == c["read"] == 41 for c in counts)


def test_many_reasons_are_summed_up(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 0}\n' * 9)
    bad = BadRows(open_source(SourceSpec("a.jsonl"), base_dir=tmp_path), skip=True)
    for number in range(9):
        bad.refused(number, f"reason {number}")
    lines = bad.summary()
    assert bad.count == 9
    assert len(lines) == 6
    assert lines[-1] == "left out for other reasons: 4"
