"""Shards damaged while a run uses them: one error with shard and row, no signal, no hang."""

import errno
import multiprocessing
import os
import shutil
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from dist_ft.data.loader import BatchPlan, StepLoader, eval_batches
from dist_ft.data.sampling import RoundRobin
from dist_ft.data.shards import ShardedDataset, verify
from tests.helpers.datasets import SPEC, make_dataset, write_folder

ROUNDS = 120
LENGTHS = [400, 900, 100, 700] * 16


def every_row(data: ShardedDataset) -> None:
    data.take(np.arange(len(data)))


def opened_again(data: ShardedDataset) -> None:
    ShardedDataset(data.folder, verify="size")


def verified(data: ShardedDataset) -> None:
    verify(data.folder)


def steps(data: ShardedDataset) -> None:
    loader = StepLoader(
        {"t": data}, specs={"t": SPEC}, plan=BatchPlan(32, 8, seed=0), mixture=RoundRobin(1)
    )
    batches = loader.iterate(0)
    for _ in range(4):
        next(batches)
    batches.close()


def evaluation(data: ShardedDataset) -> None:
    list(eval_batches(data, spec=SPEC, micro_batch_size=16))


READERS = (every_row, opened_again, verified, steps, evaluation)


def read_until_cut(connection: Connection, whole: Path, folder: Path) -> None:
    """Read copies of a data set without a pause and send the error that ends each."""
    for number in range(ROUNDS):
        shutil.copytree(whole, folder / "t", dirs_exist_ok=True)
        data = ShardedDataset(folder / "t", verify="size")
        connection.send(None)
        try:
            while True:
                READERS[number % len(READERS)](data)
        except ValueError as error:
            connection.send(f"{error}")


def test_a_shard_cut_at_any_moment_is_an_error(tmp_path: Path) -> None:
    write_folder(tmp_path / "t", lengths=LENGTHS, target_bytes=10**9)
    (shard,) = (tmp_path / "t").glob("*.arrow")
    size = shard.stat().st_size
    (tmp_path / "read").mkdir()
    ours, theirs = multiprocessing.Pipe()
    reader = multiprocessing.get_context("fork").Process(
        target=read_until_cut, args=(theirs, tmp_path / "t", tmp_path / "read")
    )
    reader.start()
    theirs.close()
    rng = np.random.default_rng()
    within = 0
    for _ in range(ROUNDS):
        # Not minus SIGBUS (then there is nothing to receive), and not waiting for ever.
        assert ours.poll(30)
        assert ours.recv() is None
        time.sleep(rng.uniform(0, 0.004))
        # Any number of bytes that leaves some of the rows out, also none and whole pages.
        os.truncate(tmp_path / "read" / "t" / shard.name, int(rng.integers(0, size // 2)))
        assert ours.poll(30)
        message = ours.recv()
        assert shard.name in message
        assert "restore the file or prepare the data again" in message
        within += "was cut from" in message
    reader.join(30)
    assert reader.exitcode == 0
    # The others were found when the file was opened or its bytes were checked.
    assert within > ROUNDS // 3


def test_the_error_of_a_cut_shard_names_its_place(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "t", lengths=LENGTHS, target_bytes=10**9)
    (shard,) = (tmp_path / "t").glob("*.arrow")
    size = shard.stat().st_size
    whole = [np.asarray(row).tolist() for row in data.take(np.arange(64))["input_ids"]]
    os.truncate(shard, 4096)
    place = f"{shard.name} was cut from {size} to 4096 bytes while it is in use"
    # What lies before the cut is still right.
    first = data.take(np.array([0]), columns={"input_ids"})["input_ids"][0]
    assert np.asarray(first).tolist() == whole[0]
    with pytest.raises(ValueError, match=rf"{place} \(row 7 of the data can't be read\)"):
        data.take(np.array([0, 7, 9]))
    loader = StepLoader(
        {"t": data}, specs={"t": SPEC}, plan=BatchPlan(8, 4, seed=0), mixture=RoundRobin(1)
    )
    with pytest.raises(ValueError, match=rf"task 't', step 5: rows \d+, .*{place} \(row \d+"):
        next(loader.iterate(5))


def test_a_failing_disk_is_an_error_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_dataset(tmp_path / "t", lengths=LENGTHS, target_bytes=10**9)
    read = os.pread
    (shard,) = (tmp_path / "t").glob("*.arrow")

    def failing(descriptor: int, count: int, place: int) -> bytes:
        if place > 50_000:
            raise OSError(errno.EIO, "Input/output error")
        return read(descriptor, count, place)

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(ValueError, match=rf"{shard.name} can't be read at byte .*row \d+ of the"):
        data.take(np.arange(64))


def test_a_read_that_is_interrupted_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_dataset(tmp_path / "t", lengths=LENGTHS, target_bytes=10**9)
    whole = data.take(np.arange(64))
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda file, count, place: read(file, min(count, 99), place))
    again = data.take(np.arange(64))
    assert again["name"] == whole["name"]
    for name in ("input_ids", "labels"):
        assert all(map(np.array_equal, again[name], whole[name]))


def first_rows(data: ShardedDataset) -> list[list[int]]:
    return [np.asarray(ids).tolist() for ids in data.take(np.arange(8))["input_ids"]]


def test_a_data_set_removed_or_replaced_in_use_stays_readable(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "t", lengths=LENGTHS, target_bytes=10**9)
    expected = first_rows(data)
    (shard,) = (tmp_path / "t").glob("*.arrow")
    (tmp_path / "other").write_bytes(b"x")
    (tmp_path / "other").rename(shard)
    assert first_rows(data) == expected
    shutil.rmtree(tmp_path / "t")
    assert first_rows(data) == expected


def test_a_shard_that_is_another_ones_copy_is_refused(tmp_path: Path) -> None:
    # Rows of the same lengths and names as long, so that the files have one size.
    write_folder(tmp_path / "t", lengths=[4] * 28, target_bytes=1)
    first, second = sorted((tmp_path / "t").glob("*.arrow"))[2:]
    assert first.stat().st_size == second.stat().st_size
    shutil.copyfile(first, second)
    for level in ("hash", "cached"):
        with pytest.raises(ValueError, match=f"{second.name} has the hash"):
            ShardedDataset(tmp_path / "t", verify=level)
