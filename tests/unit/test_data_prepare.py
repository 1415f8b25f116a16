import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.data.fingerprint import tokenizer_fingerprint
from dist_ft.data.prepare import PrepareSpec, RowFunctions, SplitPlan, prepare_split
from dist_ft.data.selection import KeySet
from dist_ft.data.shards import ShardedDataset, read_manifest
from dist_ft.data.sources import SourceSpec

MAX_LENGTH = 6


def encode(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One token a character; "windows" in a row gives several features."""
    features = []
    for row in rows:
        if row["label"] not in (0, 1):
            raise ValueError(f"label {row['label']!r} is unknown")
        ids = [ord(c) % 100 for c in row["text"].strip()]
        feature = {
            "input_ids": ids[:MAX_LENGTH],
            "loss_count": 1,
            "source_row": row["source_row"],
            "label": row["label"],
            "truncated_tokens": max(0, len(ids) - MAX_LENGTH),
        }
        features.extend(dict(feature) for _ in range(row.get("windows", 1)))
    return features


FUNCTIONS = RowFunctions(
    schema=pa.schema([pa.field("label", pa.int32())]),
    required_columns=("text", "label"),
    split_key=lambda row: row.get("group", row["text"]),
    dedupe_key=lambda row: row["text"],
    encode=encode,
)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> SourceSpec:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceSpec(path.name)


def make_rows(first: int, last: int, **extra: Any) -> list[Mapping[str, Any]]:
    return [{"text": f"text {n}", "label": n % 2, **extra} for n in range(first, last)]


def make_spec(folder: Path, sources: dict[str, SourceSpec], **options: Any) -> PrepareSpec:
    plan = SplitPlan(sources, base_dir=folder, fractions=options.pop("fractions", {}))
    return PrepareSpec("demo", plan=plan, functions=FUNCTIONS, **options)


def source_rows(folder: Path) -> list[int]:
    dataset = ShardedDataset(folder, verify="hash")
    return np.asarray(dataset.take(np.arange(len(dataset)))["source_row"]).tolist()


def test_rows_arrive_in_order_without_duplicates(tmp_path: Path) -> None:
    rows = [*make_rows(0, 1500), *make_rows(700, 800), *make_rows(1500, 1600)]
    spec = make_spec(tmp_path, {"train": write_rows(tmp_path / "a.jsonl", rows)})
    seen: list[int] = []
    prepared = prepare_split(spec, split="train", data_dir=tmp_path / "d", progress=seen.append)
    assert prepared.folder == tmp_path / "d" / "demo" / "train"
    assert source_rows(prepared.folder) == [*range(1500), *range(1600, 1700)]
    assert seen == [1000, 1700]
    manifest = prepared.manifest
    assert manifest == read_manifest(prepared.folder)
    assert manifest.selection == {
        "read": 1700, "invalid": 0, "other_split": 0, "leaking": 0, "duplicates": 100, "kept": 1600
    }  # fmt: skip
    lengths = [min(MAX_LENGTH, len(f"text {n}")) for n in range(1600)]
    dropped = [max(0, len(f"text {n}") - MAX_LENGTH) for n in range(1600)]
    assert manifest.tokens == sum(lengths)
    assert manifest.preprocessing["rows_truncated"] == sum(n > 0 for n in dropped)
    assert manifest.preprocessing["tokens_dropped"] == sum(dropped)
    assert list((tmp_path / "d" / "demo").glob(".*.tmp")) == []


def test_rows_that_become_large_are_encoded_a_few_at_a_time(tmp_path: Path) -> None:
    rows = [*make_rows(0, 60), *make_rows(20, 40)]
    spec = make_spec(tmp_path, {"train": write_rows(tmp_path / "a.jsonl", rows)})
    sizes: list[int] = []

    def watched(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        sizes.append(len(rows))
        return encode(rows)

    few = replace(spec, functions=replace(FUNCTIONS, encode=watched, rows_at_once=7))
    one, other = (
        prepare_split(s, split="train", data_dir=tmp_path / name).manifest
        for s, name in ((spec, "d"), (few, "e"))
    )
    assert max(sizes) == 7
    assert one.shards == other.shards
    assert one.selection == other.selection


def test_raw_rows_are_the_rows_that_are_encoded(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", make_rows(0, 300))
    spec = make_spec(tmp_path, {"train": source}, fractions={"validation": 0.2})
    prepared = prepare_split(spec, split="validation", data_dir=tmp_path / "d")
    raw = list(spec.raw_rows("validation"))
    assert [row["source_row"] for row in raw] == source_rows(prepared.folder)
    assert set(raw[0]) == {"text", "label", "source_row"}


def test_fractions_are_disjoint_complete_and_depend_on_the_key_only(tmp_path: Path) -> None:
    rows = make_rows(0, 4000)
    fractions = {"validation": 0.1, "test": 0.2}

    def split_texts(rows: list[Mapping[str, Any]], name: str, **shares: float) -> dict[str, set]:
        source = write_rows(tmp_path / f"{name}.jsonl", rows)
        spec = make_spec(tmp_path, {"train": source}, fractions=shares)
        return {s: {row["text"] for row in spec.raw_rows(s)} for s in spec.plan.splits}

    first = split_texts(rows, "a", **fractions)
    assert sum(map(len, first.values())) == 4000
    assert set().union(*first.values()) == {row["text"] for row in rows}
    # Four standard deviations of a binomial share.
    assert abs(len(first["validation"]) - 400) < 4 * 19
    assert abs(len(first["test"]) - 800) < 4 * 26
    # Other rows, another order: each row stays where it was.
    changed = split_texts([*make_rows(4000, 4500), *rows[::-1][:3000]], "b", **fractions)
    for split, texts in changed.items():
        assert {t for t in texts if int(t.split()[1]) < 4000} <= first[split]
    # A larger validation split grows out of train alone.
    larger = split_texts(rows, "c", validation=0.3, test=0.2)
    assert larger["test"] == first["test"]
    assert larger["validation"] > first["validation"]


def test_groups_stay_together(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "label": 0, "group": f"passage {n % 50}"} for n in range(500)]
    spec = make_spec(
        tmp_path,
        {"train": write_rows(tmp_path / "a.jsonl", rows)},
        fractions={"validation": 0.3},
    )
    groups = [{row["group"] for row in spec.raw_rows(split)} for split in ("train", "validation")]
    assert groups[0]
    assert groups[1]
    assert groups[0].isdisjoint(groups[1])


def test_train_drops_what_occurs_in_evaluation_sources(tmp_path: Path) -> None:
    sources = {
        "train": write_rows(
            tmp_path / "train.jsonl",
            [*make_rows(0, 100), {"text": "other", "label": 1, "group": "text 205"}],
        ),
        "validation": write_rows(tmp_path / "validation.jsonl", make_rows(90, 110)),
        "test": write_rows(tmp_path / "test.jsonl", make_rows(200, 210)),
    }
    spec = make_spec(tmp_path, sources)
    manifest = prepare_split(spec, split="train", data_dir=tmp_path / "d").manifest
    # Ten by their text, and one because its group is a group of the test split.
    assert manifest.selection["leaking"] == 11
    assert manifest.rows == 90
    validation = prepare_split(spec, split="validation", data_dir=tmp_path / "d").manifest
    assert validation.rows == 20


def test_reuse_refusal_and_rebuild(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", make_rows(0, 50))
    spec = make_spec(tmp_path, {"train": source}, tokenizer={"content_sha256": "one"})
    first = prepare_split(spec, split="train", data_dir=tmp_path / "d")
    again = prepare_split(spec, split="train", data_dir=tmp_path / "d")
    assert (first.reused, again.reused) == (False, True)
    assert first.manifest == again.manifest
    other = replace(spec, tokenizer={"content_sha256": "two"}, arguments={"max_length": 5})
    with pytest.raises(
        ValueError,
        match=r"arguments\.max_length: .absent. -> 5; tokenizer.content_sha256: one -> t",
    ):
        prepare_split(other, split="train", data_dir=tmp_path / "d")
    with pytest.raises(ValueError, match=r"with another tokenizer .*one -> two.*data_dir"):
        prepare_split(other, split="train", data_dir=tmp_path / "d", replacing="settings")
    rebuilt = prepare_split(other, split="train", data_dir=tmp_path / "d", replacing="anything")
    assert not rebuilt.reused
    assert rebuilt.manifest.dataset_id != first.manifest.dataset_id
    write_rows(tmp_path / "a.jsonl", make_rows(0, 51))
    with pytest.raises(ValueError, match=r"source\.train\.files"):
        prepare_split(other, split="train", data_dir=tmp_path / "d")
    longer = replace(other, arguments={"max_length": 6})
    rebuilt = prepare_split(longer, split="train", data_dir=tmp_path / "d", replacing="settings")
    shard = next(rebuilt.folder.glob("*.arrow"))
    shard.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{shard.name} has 0 bytes"):
        prepare_split(other, split="train", data_dir=tmp_path / "d")
    assert prepare_split(
        other, split="train", data_dir=tmp_path / "d", replacing="anything"
    ).manifest.rows


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, {"train": write_rows(tmp_path / "a.jsonl", make_rows(0, 5))})
    own = tmp_path / "d" / "demo" / "train" / "notes.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(ValueError, match=r"is no prepared data set \(manifest.json is missing\)"):
        prepare_split(spec, split="train", data_dir=tmp_path / "d", replacing="anything")
    assert own.read_text() == "mine"


BAD_ROWS = [
    ({"text": "x", "label": None}, "line 2: column 'label' is null"),
    ({"text": "x", "label": float("nan")}, "line 2: .*column 'label' is null"),
    ({"text": None, "label": 1}, "line 2: .*column 'text' is null"),
    ({"label": 1}, "line 2: .*column 'text' is null"),
    ({"text": " \n", "label": 1}, "line 2: .*column 'text' is blank"),
    ({"text": "x", "label": 7}, "line 2: .*label 7 is unknown"),
    ({"text": 5, "label": 1}, "line 2: .*keys must be text"),
    ({"text": "ü\ud800", "label": 1}, "line 2: .*'text' is no valid text .* at character 1"),
    ({"text": ["a", "\udfff"], "label": 1}, "line 2: .*'text' is no valid text"),
    (
        {"text": "x" * 10**7, "label": 1},
        "line 2: .*'text' has 10,000,000 characters, more than 2,0",
    ),
    ({"text": ["x" * 99] * 10**5, "label": 1}, "line 2: .*'text' has 9,900,000 characters"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS)
def test_bad_row_is_named_or_skipped(
    tmp_path: Path, bad: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*make_rows(0, 1), bad, *make_rows(1, 5)]
    spec = make_spec(tmp_path, {"train": write_rows(tmp_path / "a.jsonl", rows)})
    where = r"\(tasks\.demo\.on_error: skip\)"
    with pytest.raises(ValueError, match=rf"a.jsonl, {message}.*{where}"):
        prepare_split(spec, split="train", data_dir=tmp_path / "d")
    assert not (tmp_path / "d" / "demo" / "train").exists()
    prepared = prepare_split(replace(spec, on_error="skip"), split="train", data_dir=tmp_path / "d")
    assert source_rows(prepared.folder) == [0, 2, 3, 4, 5]
    assert prepared.manifest.selection["invalid"] == 1
    assert prepared.manifest.selection["kept"] == 5
    assert prepared.manifest.selection["read"] == 6
    assert re.search(r"demo/train: left out 1 row: .*a.jsonl, line 2\)", caplog.text)


def test_unreadable_lines_are_counted(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", make_rows(0, 5))
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b"\xff\n{\n")
    spec = make_spec(tmp_path, {"train": source}, on_error="skip")
    selection = prepare_split(spec, split="train", data_dir=tmp_path / "d").manifest.selection
    assert (selection["read"], selection["invalid"], selection["kept"]) == (7, 2, 5)


def test_empty_split_is_refused(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", make_rows(0, 3))
    spec = make_spec(tmp_path, {"train": source}, fractions={"test": 0.0001})
    with pytest.raises(
        ValueError, match=r"split 'test' is empty \(3 rows read, 3 in another split\)"
    ):
        prepare_split(spec, split="test", data_dir=tmp_path / "d")
    both = {"train": source, "validation": source}
    with pytest.raises(ValueError, match=r"'train' is empty.*3 that an evaluation split has, too"):
        prepare_split(make_spec(tmp_path, both), split="train", data_dir=tmp_path / "d")


def test_encode_is_checked(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", make_rows(5, 8))

    def run(change: dict[str, Any], **options: Any) -> None:
        spec = make_spec(tmp_path, {"train": source}, **options)
        changed = replace(FUNCTIONS, encode=lambda rows: [{**f, **change} for f in encode(rows)])
        prepare_split(replace(spec, functions=changed), split="train", data_dir=tmp_path / "d")

    with pytest.raises(ValueError, match="source_row 77, which is no row of its batch"):
        run({"source_row": 77})
    with pytest.raises(ValueError, match="no row has a loss term"):
        run({"loss_count": 0})
    with pytest.raises(ValueError, match="token id 99 is outside of the tokenizer's vocabulary"):
        run({"input_ids": [99]}, tokenizer={"vocab_size": 99})
    with pytest.raises(ValueError, match=r"encode\(\) and schema\(\) must agree"):
        run({"unknown": 1})


def test_plans_are_checked(tmp_path: Path) -> None:
    source = SourceSpec("a.jsonl")
    cases: list[tuple[dict[str, SourceSpec], dict[str, float], str]] = [
        ({"validation": source}, {}, "'train' has no source"),
        ({"train": source, "dev": source}, {}, "split 'dev' is unknown"),
        ({"train": source, "test": source}, {"test": 0.1}, "a source and a fraction"),
        ({"train": source}, {"test": 0.6, "validation": 0.4}, "leave rows for train"),
        ({"train": source}, {"test": 0.0}, "must lie between 0 and 1"),
    ]
    for sources, fractions, message in cases:
        with pytest.raises(ValueError, match=message):
            SplitPlan(sources, base_dir=tmp_path, fractions=fractions)
    with pytest.raises(ValueError, match="no split 'test', only train"):
        SplitPlan({"train": source}, base_dir=tmp_path).source_of("test")


def test_features_of_one_row_stay_together(tmp_path: Path) -> None:
    rows = make_rows(0, 1100, windows=3)
    spec = make_spec(tmp_path, {"train": write_rows(tmp_path / "a.jsonl", rows)})
    prepared = prepare_split(spec, split="train", data_dir=tmp_path / "d")
    assert source_rows(prepared.folder) == [n for n in range(1100) for _ in range(3)]
    assert (prepared.manifest.rows, prepared.manifest.selection["kept"]) == (3300, 1100)


def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        rows = make_rows(0, count, windows=4)
        spec = make_spec(tmp_path, {"train": write_rows(tmp_path / f"{count}.jsonl", rows)})
        tracemalloc.start()
        prepare_split(spec, split="train", data_dir=tmp_path / str(count))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)  # what is imported at the first call
    # Eight bytes a row are kept for finding duplicates; everything else is one batch.
    assert peak(8000) < 1.3 * peak(2000)


def test_one_of_many_callers_works(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, {"train": write_rows(tmp_path / "a.jsonl", make_rows(0, 2000))})
    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(prepare_split, spec, split="train", data_dir=tmp_path / "d")
            for _ in range(4)
        ]
    assert sorted(call.result().reused for call in calls) == [False, True, True, True]


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    spec = make_spec(tmp_path, {"train": write_rows(tmp_path / "a.jsonl", make_rows(0, 5))})
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(RuntimeError, match=r"d/demo can't lock files .*not implemented.*-o flock"):
        prepare_split(spec, split="train", data_dir=tmp_path / "d")


KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from dist_ft.data.prepare import prepare_split
from dist_ft.data.sources import SourceSpec
from tests.unit.test_data_prepare import make_spec
folder = Path(sys.argv[1])
spec = make_spec(folder, {"train": SourceSpec("a.jsonl")})
kill = lambda read: os.kill(os.getpid(), signal.SIGKILL) if read >= int(sys.argv[2]) else None
prepare_split(spec, split="train", data_dir=folder / "d", progress=kill)
"""


def test_killed_preparation_leaves_nothing_and_is_repeated(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", make_rows(0, 2500))
    spec = make_spec(tmp_path, {"train": source})
    expected = prepare_split(spec, split="train", data_dir=tmp_path / "other").manifest
    root = Path(__file__).parents[2]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "2000"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    folder = tmp_path / "d" / "demo" / "train"
    assert not folder.exists()
    assert folder.with_name(".train.tmp").exists()
    prepared = prepare_split(spec, split="train", data_dir=tmp_path / "d")
    assert prepared.manifest.dataset_id == expected.dataset_id
    assert not folder.with_name(".train.tmp").exists()


@given(st.lists(st.lists(st.integers(0, 60), max_size=20), max_size=12))
def test_key_set_is_a_set(batches: list[list[int]]) -> None:
    keys, reference = KeySet(), set[int]()
    for batch in batches:
        array = np.array(batch, dtype=np.uint64)
        assert keys.contains(array).tolist() == [key in reference for key in batch]
        new = []
        for key in batch:
            new.append(key not in reference)
            reference.add(key)
        assert keys.add(array).tolist() == new
        assert len(keys) == len(reference)


def test_tokenizer_fingerprint_sees_what_matters(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def build(words: list[str]) -> PreTrainedTokenizerFast:
        vocab = {word: n for n, word in enumerate(["[UNK]", "[PAD]", *words])}
        backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]"
        )

    base = build(["The", "quick", "Fox"])
    found = tokenizer_fingerprint(base)
    assert found["vocab_size"] == 5
    base("The quick", truncation=True, max_length=1, padding="max_length")
    assert tokenizer_fingerprint(base) == found
    base.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == found
    # Same size, other order: the size alone would not tell.
    swapped = tokenizer_fingerprint(build(["quick", "The", "Fox"]))
    assert swapped["vocab_size"] == found["vocab_size"]
    assert swapped["content_sha256"] != found["content_sha256"]
    assert swapped["probes_sha256"] != found["probes_sha256"]
    base.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(base)["chat_template_sha256"] != found["chat_template_sha256"]
    base.add_tokens(["dog"])
    assert tokenizer_fingerprint(base)["added_tokens"] == found["added_tokens"] + 1
