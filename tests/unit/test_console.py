"""What a person reads while a run goes on, where there is no terminal for a bar."""

import io
import os
import pty
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console as RichConsole
from rich.text import Text

from dist_ft.recipe import load_recipe
from dist_ft.train.console import Console, duration_text
from dist_ft.train.reading import ReadingProgress


@pytest.mark.parametrize(
    ("total", "lines"),
    [
        (31, [10, 20, 30]),  # a short run has a line at each logging interval
        (1000, list(range(50, 1000, 50))),
        (100_000, list(range(100, 100_000, 100))),
    ],
)
def test_plain_progress_lines_come_in_short_and_long_runs(
    total: int, lines: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(main=True, every=10)
    console.losses["spam"] = 0.5
    console.start(total, done=0)
    for step in range(1, total + 1):
        console.advance(step, task="spam")
    said = capsys.readouterr().err.splitlines()
    found = [re.match(rf"step (\d+)/{total} \| about \S+ (s|min|h) left \| ", s) for s in said]
    assert [int(match.group(1)) for match in found if match] == lines
    assert len(found) == len(lines)
    assert said[0].endswith("phase 0 | spam | loss spam 0.500 | 0 tokens/s")


def test_what_is_left_counts_from_where_the_run_was_resumed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([100.0, 110.0])
    monkeypatch.setattr("dist_ft.train.console.time.monotonic", lambda: next(now))
    console = Console(main=True, every=10)
    console.start(100, done=10)
    console.advance(20, task="spam")  # ten steps in ten seconds
    assert "step 20/100 | about 80 s left" in capsys.readouterr().err


def test_a_run_says_what_it_is_and_what_can_be_done_then(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console(main=True)
    recipe = load_recipe("cpu-spam", needs_files=False)
    console.begin_run(
        recipe, total_steps=1200, world_size=1, device="cpu", folder=Path("runs/cpu-spam")
    )
    console.start(1200, done=0)
    console.end_run(Path("runs/cpu-spam"), step=300)  # it got no better
    first, last = capsys.readouterr().err.splitlines()
    assert first == "runs/cpu-spam: 1,200 steps (1ep) of 32 rows on 1 rank, cpu, fp32, ZeRO-1"
    assert last.startswith("done: step 300 after ")
    assert "dist-ft evaluate runs/cpu-spam, dist-ft export runs/cpu-spam" in last


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_bar_is_never_so_long_that_figures_are_cut(width: int) -> None:
    out = io.StringIO()
    terminal = RichConsole(file=out, force_terminal=True, width=width)
    console = Console(main=True)
    console._rich = terminal
    console.losses |= {"questions": 0.1234, "entities": 2.3456, "answers": 3.4567}
    console.tokens_per_s = 123_456.0
    console.start(50_000, done=12_345)
    console.advance(23_456, task="questions+entities")
    console.stop()
    with ReadingProgress("questions/validation", expected=lambda: 9_000_000, say=print,
                         terminal=terminal) as reading:  # fmt: skip
        reading(1_234_567)
    shown = " ".join(Text.from_ansi(out.getvalue()).plain.split())
    assert "…" not in shown
    for figure in ("23456/50000", "0.123", "2.346", "3.457", "123,456 tokens/s"):
        assert figure in shown
    assert "1,234,567 rows | " in shown
    assert re.search(r"rows/s( |$)", shown)
    assert re.search(r"23456/50000 (-:--:--|\d+:\d\d:\d\d)", shown)


@pytest.mark.parametrize(
    ("seconds", "text"), [(14.4, "14 s"), (1500.0, "25 min"), (12_600.0, "3.5 h")]
)
def test_durations_have_units_that_suit_them(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize("terminal", [True, False])
def test_output_that_goes_away_ends_nothing(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = pty.openpty() if terminal else os.pipe()
    with os.fdopen(writer, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        console = Console(main=True, every=1)
        console.start(10, done=0)
        assert (console._bar is not None) == terminal
        console.advance(1, task="spam")
        os.close(reader)  # the terminal is closed, or who reads the pipe has ended
        console.advance(2, task="spam")
        console.say("saved")
        console.stop()
        console.say("stopped")
    # Closing it has written what was left: nowhere.


def test_output_on_a_full_disk_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        console = Console(main=True)
        console.say("saved")
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # there is space again
        console.say("stopped")
