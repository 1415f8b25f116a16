"""Preparing with several processes, after kills, with raw rows; and remembered verification."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dist_ft.data.manifest import read_manifest
from dist_ft.data.prepare import PreparedSplit, PrepareSpec, prepare_split
from dist_ft.data.schema import shard_schema
from dist_ft.data.shards import ShardedDataset
from dist_ft.data.verification import CACHE_NAME
from tests.helpers.datasets import write_folder
from tests.unit.test_data_prepare import FUNCTIONS, encode, make_rows, make_spec, write_rows

SHARD_BYTES = 20_000


def make_mixed_spec(folder: Path, **options: Any) -> PrepareSpec:
    """Rows with windows, truncation, duplicates, and bad ones that only encode() finds."""
    rows = [
        {"text": f"text {n % 5500}", "label": 7 if n % 97 == 0 else n % 2, "windows": 1 + n % 3}
        for n in range(6000)
    ]
    source = write_rows(folder / "a.jsonl", rows)
    options = {"on_error": "skip", "fractions": {"validation": 0.1}} | options
    return replace(make_spec(folder, {"train": source}, **options), shard_bytes=SHARD_BYTES)


def prepare(spec: PrepareSpec, folder: Path, **options: Any) -> PreparedSplit:
    return prepare_split(spec, split="train", data_dir=folder, **options)


def test_any_number_of_processes_gives_the_same_data(tmp_path: Path) -> None:
    spec = make_mixed_spec(tmp_path)
    expected = prepare(spec, tmp_path / "1").manifest
    assert len(expected.shards) > 5
    assert expected.selection["invalid"] > 50
    assert expected.preprocessing["rows_truncated"] > 1000
    for processes in (2, 3):
        found = prepare(spec, tmp_path / str(processes), processes=processes).manifest
        assert found == expected
        assert found.dataset_id == expected.dataset_id


def test_bad_rows_and_wrong_encodings_stop_several_processes(tmp_path: Path) -> None:
    spec = make_mixed_spec(tmp_path, on_error="stop")
    with pytest.raises(ValueError, match=r"line 98: label 7 is unknown.*on_error: skip"):
        prepare(spec, tmp_path / "d", processes=2)
    wrong = replace(FUNCTIONS, encode=lambda rows: [{**f, "extra": 1} for f in encode(rows)])
    spec = replace(make_mixed_spec(tmp_path), functions=wrong)
    with pytest.raises(ValueError, match=r"encode\(\) and schema\(\) must agree"):
        prepare(spec, tmp_path / "d", processes=2)
    assert not list((tmp_path / "d" / "demo").glob("*train*"))[1:]
    with pytest.raises(ValueError, match="processes must be at least 1, got 0"):
        prepare(spec, tmp_path / "d", processes=0)


def test_a_dead_process_is_an_error_and_work_is_kept(tmp_path: Path) -> None:
    spec = make_mixed_spec(tmp_path)
    expected = prepare(spec, tmp_path / "other").manifest
    parent = os.getpid()

    def dying(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if os.getpid() != parent and any(row["source_row"] > 5000 for row in rows):
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(rows)

    broken = replace(spec, functions=replace(FUNCTIONS, encode=dying))
    with pytest.raises(RuntimeError, match="died, perhaps for want of memory: use fewer"):
        prepare(broken, tmp_path / "d", processes=2)
    left = tmp_path / "d" / "demo" / ".train.tmp"
    assert list(left.glob("shard-*.arrow"))
    assert prepare(spec, tmp_path / "d").manifest == expected
    assert not left.exists()


def counting(seen: list[int]) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    def counted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        # Of a batch with a bad row, all rows are encoded a second time, alone.
        seen.extend(row["source_row"] for row in rows)
        return encode(rows)

    return counted


def interrupt(spec: PrepareSpec, folder: Path, *, at: int) -> None:
    def stop(read: int) -> None:
        if read >= at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(spec, folder, progress=stop)


def test_resuming_encodes_only_what_is_missing(tmp_path: Path) -> None:
    spec = make_mixed_spec(tmp_path)
    expected = prepare(spec, tmp_path / "other").manifest
    interrupt(spec, tmp_path / "d", at=4000)
    seen: list[int] = []
    counted = replace(spec, functions=replace(FUNCTIONS, encode=counting(seen)))
    assert prepare(counted, tmp_path / "d").manifest == expected
    assert min(seen) >= 2000
    assert max(seen) > 5000
    assert sorted(p.name for p in (tmp_path / "d" / "demo" / "train").iterdir()) == sorted(
        [*(shard.file for shard in expected.shards), "manifest.json", "manifest.sha256"]
    )


def test_leftovers_are_used_only_if_they_are_right(tmp_path: Path) -> None:
    spec = make_mixed_spec(tmp_path)
    expected = prepare(spec, tmp_path / "other").manifest

    def damage_shard(left: Path) -> None:
        shard = sorted(left.glob("*.arrow"))[0]
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)

    def lose_shard(left: Path) -> None:
        sorted(left.glob("*.arrow"))[1].unlink()

    def add_files(left: Path) -> None:
        (left / "shard-00099-00000000.arrow").write_bytes(b"x")
        (left / ".shard-00003.tmp").write_bytes(b"x")

    for damage in (damage_shard, lose_shard, add_files):
        data_dir = tmp_path / damage.__name__
        left = data_dir / "demo" / ".train.tmp"
        interrupt(spec, data_dir, at=4000)
        damage(left)
        prepared = prepare(spec, data_dir)
        assert prepared.manifest == expected
        assert {p.name for p in prepared.folder.glob("*.arrow")} == {
            shard.file for shard in expected.shards
        }


def test_leftovers_of_other_inputs_are_not_used(tmp_path: Path) -> None:
    spec = make_mixed_spec(tmp_path)
    interrupt(spec, tmp_path / "d", at=4000)
    other = replace(spec, arguments={"max_length": 5})
    seen: list[int] = []
    counted = replace(other, functions=replace(FUNCTIONS, encode=counting(seen)))
    assert prepare(counted, tmp_path / "d").manifest == prepare(other, tmp_path / "e").manifest
    assert min(seen) < 10


def prepare_slowly(connection: Connection, folder: Path, processes: int) -> None:
    def slow(read: int) -> None:
        connection.send(read)
        time.sleep(0.05)

    prepare(make_mixed_spec(folder), folder / "d", processes=processes, progress=slow)


def test_killed_at_random_again_and_again(tmp_path: Path) -> None:
    spec = make_mixed_spec(tmp_path)
    expected = prepare(spec, tmp_path / "other").manifest
    chosen = random.Random(3)
    left = tmp_path / "d" / "demo" / ".train.tmp"
    kept = 0
    for attempt in range(6):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(
            target=prepare_slowly, args=(theirs, tmp_path, 1 + attempt % 2)
        )
        process.start()
        for _ in range(chosen.randint(1, 6)):
            assert ours.poll(30)
            ours.recv()
        time.sleep(chosen.uniform(0, 0.05))
        # Only the parent: its encoding processes must notice and let go of the lock.
        process.kill()
        process.join(30)
        kept += len(list(left.glob("shard-*.arrow"))) if left.exists() else 0
    assert kept > 0
    # Waits for ever if one of them still holds it; the suite's limit ends that.
    assert prepare(spec, tmp_path / "d").manifest == expected


def test_raw_rows_are_kept_if_asked_for(tmp_path: Path) -> None:
    plain = make_mixed_spec(tmp_path)
    spec = replace(plain, raw_columns=("text", "label", "absent"))
    without = prepare(plain, tmp_path / "plain").manifest
    assert "raw" not in without.schema.names
    assert set(without.preprocessing["arguments"]) == {"on_error"}
    prepared = prepare(spec, tmp_path / "d")
    assert prepared.manifest.preprocessing["arguments"]["raw_columns"] == [*spec.raw_columns]
    dataset = ShardedDataset(prepared.folder, verify="hash")
    columns = dataset.take(np.arange(len(dataset)))
    for text, row, label in zip(
        columns["raw"], columns["source_row"], columns["label"], strict=True
    ):
        assert text == f'{{"label":{label},"text":"text {row % 5500}"}}'
    with pytest.raises(ValueError, match="prepared differently"):
        prepare(plain, tmp_path / "d")


def test_raw_rows_must_be_json(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", make_rows(0, 5, extra="北京 \u2028"))
    spec = replace(make_spec(tmp_path, {"train": source}), raw_columns=("extra", "source_row"))
    prepared = prepare(spec, tmp_path / "d")
    raw = ShardedDataset(prepared.folder, verify="hash").take(np.arange(1))["raw"]
    assert json.loads(str(raw[0])) == {"extra": "北京 \u2028", "source_row": 0}

    def select(value: Any) -> PrepareSpec:
        def dedupe(row: dict[str, Any]) -> str:
            row["extra"] = value
            return row["text"]

        return replace(spec, functions=replace(FUNCTIONS, dedupe_key=dedupe))

    for value in (b"bytes", float("nan")):
        with pytest.raises(ValueError, match=r"row 1: .*extra, source_row can't be kept as JSON"):
            prepare(select(value), tmp_path / "e")


def test_schema_with_raw_rows() -> None:
    assert (
        shard_schema(FUNCTIONS.schema).names[:4]
        == shard_schema(FUNCTIONS.schema, raw=True).names[:4]
    )
    with pytest.raises(ValueError, match="'raw' is already in the shard schema"):
        shard_schema(pa.schema([pa.field("raw", pa.string())]), raw=True)


def settle(folder: Path) -> None:
    """Makes the files look old enough to be remembered."""
    for path in folder.glob("*.arrow"):
        os.utime(path, ns=(10**18, 10**18))


def flip(path: Path) -> None:
    """Damages a file so that inode, size and time stay the same."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[content.index(b"eile-") - 1] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_ino == status.st_ino


def test_verification_is_remembered(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    write_folder(folder, lengths=[5, 60, 7] * 30)
    first, second = sorted(folder.glob("*.arrow"))[:2]
    settle(folder)
    ShardedDataset(folder, verify="cached")
    remembered = (folder / CACHE_NAME).read_bytes()
    # Damage that nothing but reading can show: that it passes says that nothing was read.
    flip(first)
    ShardedDataset(folder, verify="cached")
    with pytest.raises(ValueError, match=f"{first.name} has the hash"):
        ShardedDataset(folder, verify="hash")
    flip(first)
    # Another time, another size, another inode: each is read.
    os.utime(first)
    flip(first)
    with pytest.raises(ValueError, match=f"{first.name} has the hash"):
        ShardedDataset(folder, verify="cached")
    flip(first)
    flip(second)
    replaced = tmp_path / "copy"
    replaced.write_bytes(second.read_bytes())
    os.utime(replaced, ns=(10**18, 10**18))
    replaced.rename(second)
    with pytest.raises(ValueError, match=f"{second.name} has the hash"):
        ShardedDataset(folder, verify="cached")
    assert (folder / CACHE_NAME).read_bytes() == remembered


def test_fresh_files_are_not_remembered(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    write_folder(folder, lengths=[50] * 20)
    ShardedDataset(folder, verify="cached")
    flip(min(folder.glob("*.arrow")))
    with pytest.raises(ValueError, match="has the hash"):
        ShardedDataset(folder, verify="cached")


@pytest.mark.parametrize("content", ["", "[]", '{"version": 9}', '{"version": 1, "files": 3}', "{"])
def test_a_damaged_cache_is_ignored(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "t"
    write_folder(folder, lengths=[50] * 20)
    settle(folder)
    (folder / CACHE_NAME).write_text(content)
    flip(min(folder.glob("*.arrow")))
    with pytest.raises(ValueError, match="has the hash"):
        ShardedDataset(folder, verify="cached")
    flip(min(folder.glob("*.arrow")))
    ShardedDataset(folder, verify="cached")
    assert json.loads((folder / CACHE_NAME).read_text())["version"] == 1


def test_long_rows_make_small_batches(tmp_path: Path) -> None:
    rows = [{"text": f"{n} " + "x" * 400_000, "label": 1} for n in range(8)]
    spec = make_spec(tmp_path, {"train": write_rows(tmp_path / "a.jsonl", rows)})
    seen: list[int] = []
    prepared = prepare(spec, tmp_path / "d", progress=seen.append)
    assert seen == [3, 6, 8]
    assert read_manifest(prepared.folder).rows == 8
