"""Preparing where disks, networks and folders fail: what is damaged is made anew, the rest kept."""

import errno
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_ft.data import files, folders, prepare
from dist_ft.data.prepare import PreparedSplit, PrepareSpec, prepare_split
from dist_ft.data.shards import verify
from dist_ft.data.sources import SourceSpec
from tests.unit.test_data_prepare import FUNCTIONS, encode, make_rows, make_spec

ROWS = 4500
Prepare = Callable[..., PreparedSplit]


@pytest.fixture
def encoded() -> list[int]:
    """The numbers of the rows that were encoded so far."""
    return []


@pytest.fixture
def spec(tmp_path: Path, encoded: list[int]) -> PrepareSpec:
    """A split of five batches, of which each but the last fills a shard."""
    pq.write_table(pa.Table.from_pylist(make_rows(0, ROWS)), tmp_path / "a.parquet")

    def counted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        encoded.extend(row["source_row"] for row in rows)
        return encode(rows)

    made = make_spec(tmp_path, {"train": SourceSpec("a.parquet")})
    return replace(made, functions=replace(FUNCTIONS, encode=counted), shard_bytes=20_000)


@pytest.fixture
def make(spec: PrepareSpec, tmp_path: Path) -> Prepare:
    def made(name: str = "d", **options: Any) -> PreparedSplit:
        return prepare_split(spec, split="train", data_dir=tmp_path / name, **options)

    return made


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damage(folder: Path) -> Path:
    shard = min(folder.glob("*.arrow"))
    body = bytearray(shard.read_bytes())
    body[len(body) // 2] ^= 1
    shard.write_bytes(body)
    return shard


@pytest.mark.parametrize("replacing", ["settings", "anything"])
def test_a_damaged_shard_is_not_used_again(make: Prepare, replacing: str) -> None:
    first = make()
    before = content(first.folder)
    shard = damage(first.folder)
    with pytest.raises(ValueError, match=f"{shard.name} has the hash .*prepare the data again"):
        make()
    again = make(replacing=replacing)
    assert not again.reused
    verify(again.folder)
    assert content(again.folder) == before
    assert make(replacing=replacing).reused


def failing(error: Exception, *, after: int) -> Callable[[Path], Iterator[pa.RecordBatch]]:
    """Returns a reader of parquet whose disk fails after some batches."""
    read = files._parquet

    def parquet(path: Path) -> Iterator[pa.RecordBatch]:
        for number, batch in enumerate(read(path)):
            if number == after:
                raise error
            yield batch

    return parquet


def test_shards_survive_a_source_that_fails(
    make: Prepare, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = content(make("other").folder)
    for error in (OSError(errno.EIO, "Input/output error"), ConnectionError("reset by peer")):
        name = type(error).__name__
        with monkeypatch.context() as patched:
            patched.setattr(files, "_parquet", failing(error, after=3))
            with pytest.raises(ValueError, match=r"a\.parquet can't be read as parquet"):
                make(name)
        encoded.clear()
        assert content(make(name).folder) == expected
        assert encoded == [*range(3000, ROWS)]


def test_shards_of_bad_data_are_removed(
    make: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_parquet", failing(pa.ArrowInvalid("bad page"), after=3))
    with pytest.raises(ValueError, match="bad page"):
        make()
    assert not (tmp_path / "d" / "demo" / ".train.tmp").exists()


def test_an_old_folder_that_cannot_be_removed_is_no_obstacle(
    make: Prepare, spec: PrepareSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(length: int) -> PreparedSplit:
        other = replace(spec, arguments={"max_length": length})
        return prepare_split(other, split="train", data_dir=tmp_path / "d", replacing="settings")

    task = make().folder.parent
    with monkeypatch.context() as patched:
        patched.setattr(folders.shutil, "rmtree", lambda *_, **__: None)
        for length in (7, 8, 9):
            verify(changed(length).folder)
        assert len(list(task.glob(".train.old-*"))) == 2
    # They go when nothing holds them any more.
    assert changed(9).reused
    assert not list(task.glob(".train.old*"))


def test_a_folder_that_did_not_get_its_name_is_not_encoded_again(
    make: Prepare, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = content(make("other").folder)

    def stuck(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with monkeypatch.context() as patched:
        patched.setattr(prepare, "replace_folder", stuck)
        with pytest.raises(OSError, match="not empty"):
            make()
    encoded.clear()
    assert content(make().folder) == expected
    assert encoded == []
