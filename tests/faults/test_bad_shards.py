"""Shards damaged while a run uses them: one error with shard and row, no signal, no hang."""

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
from dist_ft.data.shards import ShardedDataset
from tests.helpers.datasets import SPEC, make_dataset, write_folder

LENGTHS = [400, 900, 100, 700] * 16


def cut(path: Path) -> None:
    """Leave only the first page, so that the rest of the map has nothing behind it."""
    os.truncate(path, 4096)


def train_on_cut_data(connection: Connection, folder: Path, when: str) -> None:
    """Read step by step, cut the shard on the way and tell which error that gives."""
    data = make_dataset(folder, lengths=LENGTHS, target_bytes=10**9)
    (shard,) = folder.glob("*.arrow")
    loader = StepLoader(
        {"t": data}, specs={"t": SPEC}, plan=BatchPlan(8, 4, seed=0), mixture=RoundRobin(1)
    )
    try:
        if when == "before the first row":
            cut(shard)
        for step in loader.iterate(0):
            if step.step == 3:
                # What is read ahead is read by then. A cut inside of one of these reads, some
                # microseconds each, would still be a signal: a map can't be read otherwise.
                time.sleep(0.5)
                cut(shard)
            if step.step > 8:
                break
    except ValueError as error:
        connection.send(f"{error}")
    try:
        list(eval_batches(data, spec=SPEC, micro_batch_size=4))
    except ValueError as error:
        connection.send(f"{error}")


@pytest.mark.parametrize("when", ["before the first row", "between steps"])
def test_a_shard_cut_under_its_map_is_an_error(tmp_path: Path, when: str) -> None:
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=train_on_cut_data, args=(theirs, tmp_path / "t", when))
    process.start()
    process.join(30)
    # Not minus SIGBUS, and not still waiting.
    assert process.exitcode == 0
    training, evaluation = ours.recv(), ours.recv()
    shard = next((tmp_path / "t").glob("*.arrow")).name
    assert training.startswith("task 't', step ")
    for message in (training, evaluation):
        assert shard in message
        assert "rows " in message
        assert "was cut from " in message
        assert "restore the file or prepare the data again" in message


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
