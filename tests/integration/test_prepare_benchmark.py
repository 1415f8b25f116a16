"""What `benchmarks/prepare.py` counts: it would notice a failed start, and data that differ."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import prepare
from benchmarks.prepare import Results, claims_of, write_source


def test_the_source_is_the_same_every_time_and_has_the_hard_rows(tmp_path: Path) -> None:
    size = 22 * 10**6
    counts = [write_source(tmp_path / name, size=size) for name in ("a", "b")]
    assert counts[0] == counts[1] > 2000
    lines = (tmp_path / "a").read_bytes().splitlines()
    assert lines == (tmp_path / "b").read_bytes().splitlines()
    assert sum(map(len, lines)) + len(lines) >= size
    lengths = sorted(map(len, lines))
    assert lengths[-1] > 10**7 > lengths[-2] > 2 * 10**6 > 3000 > lengths[-3]


def test_a_command_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"exit code 2.*recipe\.yaml"):
        prepare.prepare(tmp_path / "recipe.yaml", tmp_path / "data")


def test_memory_of_a_process_is_its_peak() -> None:
    code = "x = bytearray(200_000_000); x = None; print('ready', flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.01)
    found = prepare.peak_bytes(process.pid)
    assert process.pid in prepare.children_of(os.getpid())
    process.communicate(b"\n")
    assert 2e8 < found < 3e8
    assert prepare.peak_bytes(process.pid) == 0


def test_other_data_after_kills_do_not_hold() -> None:
    good = {"train": "1", "validation": "2"}
    results = Results(peak=10**8, ids=good, ids_after_kills=dict(good), kills=2)
    assert all(one.holds for one in claims_of(results))
    results.ids_after_kills["train"] = "3"
    results.peak = 2 * 10**9
    assert [one.holds for one in claims_of(results)] == [False, True, False]
