"""Ranks that die or hang are named, and the run comes to the same end; nobody is left behind."""

from __future__ import annotations

import os
import pty
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed

from dist_ft import cli
from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
from dist_ft.engine.ds_gradients import OwnedGradients
from dist_ft.optim.adamw import GroupAdamW
from dist_ft.report.record import read_run
from dist_ft.train import build, loop, saving, signals
from tests.helpers.supervised import before, die_before, fingerprint, supervise
from tests.helpers.tiny_run import events, newest_checkpoint, write_recipe

TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return a recipe and what its run comes to when nothing goes wrong."""
    recipe = write_recipe(
        tmp_path_factory.mktemp("supervised"),
        supervision={"timeout_s": TIMEOUT_S},
        evaluation={"every": None},
        checkpoint={"every": "4step"},
    )
    outcome = supervise(recipe, ["name=undisturbed"])
    assert (outcome.code, outcome.said) == (0, [])
    return recipe, fingerprint(recipe.parent / "runs/undisturbed")


# One place for each attempt of one run; the calls are counted in that attempt's process.
PLACES: list[tuple[str, Callable[[], None]]] = [
    ("start", lambda: die_before(build, "make_run", call=1)),
    ("step", lambda: die_before(DeepSpeedEngine, "_run", call=6)),
    # Written beside the training, so the section is what goes on meanwhile.
    ("", lambda: die_before(saving, "write_rank_file", call=1)),
    ("", lambda: die_before(saving, "commit", call=2)),
    ("start", lambda: die_before(DeepSpeedEngine, "load_state", call=1)),
    ("phase change", lambda: die_before(loop, "enter_phase", call=1)),
    ("step", lambda: die_before(OwnedGradients, "backward", call=7)),
    # In the agreement, in the step, or in looking whether all have written.
    ("", lambda: die_before(torch.distributed, "all_reduce", call=12)),
    # Once a step here: groups as small as these are updated together.
    ("step", lambda: die_before(GroupAdamW, "step", call=6)),
]


@pytest.mark.slow
def test_kills_at_nine_places_of_one_run_change_nothing(undisturbed: tuple[Path, str]) -> None:
    recipe, expected = undisturbed
    # Rank 0 commits a checkpoint and takes the lock; elsewhere the ranks take turns.
    victims = [0 if n == 3 else n % 2 for n in range(len(PLACES))]

    def fault(attempt: int, rank: int) -> None:
        if attempt < len(PLACES) and rank == victims[attempt]:
            PLACES[attempt][1]()

    outcome = supervise(recipe, ["name=killed"], fault=fault, max_restarts=len(PLACES))
    assert outcome.code == 0
    assert len(outcome.said) == len(PLACES)
    for attempt, said in enumerate(outcome.said):
        assert said.startswith(f"rank {victims[attempt]} was killed by SIGKILL"), said
        assert f"in section {PLACES[attempt][0]}" in said
    run = recipe.parent / "runs/killed"
    assert fingerprint(run) == expected
    assert not list((run / "checkpoints").glob(".tmp-*"))
    failures = [e["rank"] for e in events(run) if e["event"] == "failure"]
    assert failures == victims


def _hold_the_gil() -> None:
    re.match(r"(a+)+$", "a" * 60 + "b")


# A rank is stopped, sleeps, or computes for ever in C without letting another thread run.
HANGS: list[tuple[str, Callable[[], Any]]] = [
    ("its process is stopped", lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    ("it is not in a collective", lambda: time.sleep(600)),
    ("it is not in a collective", _hold_the_gil),
]


@pytest.mark.slow
def test_a_hung_rank_is_found_named_and_replaced(undisturbed: tuple[Path, str]) -> None:
    recipe, expected = undisturbed

    def fault(attempt: int, rank: int) -> None:
        if attempt < len(HANGS) and rank == (attempt + 1) % 2:
            hang = HANGS[attempt][1]
            before(DeepSpeedEngine, "_run", lambda call: hang() if call == 6 else None)

    outcome = supervise(recipe, ["name=hung"], fault=fault)
    assert outcome.code == 0
    for attempt, said in enumerate(outcome.said):
        pattern = r"rank (\d) hung for ([\d.]+) s \(([a-z ]+)\), at step \d+ in section step"
        match = re.match(pattern, said)
        assert match, said
        assert (int(match[1]), match[3]) == ((attempt + 1) % 2, HANGS[attempt][0])
        assert float(match[2]) < 2 * TIMEOUT_S
    run = recipe.parent / "runs/hung"
    assert fingerprint(run) == expected
    # The last hang was on rank 1, in a regular expression; rank 0 waited for it.
    assert "_hold_the_gil" in (run / "logs/rank1.stacks").read_text()
    waiting = (run / "logs/rank0.stacks").read_text()
    assert any(place in waiting for place in ("distributed_c10d.py", "engine/exchange.py"))


def test_a_stop_saves_and_ends_with_75_and_is_not_started_again(
    undisturbed: tuple[Path, str],
) -> None:
    recipe, expected = undisturbed
    launcher = os.getpid()

    def fault(attempt: int, rank: int) -> None:
        def ask(call: int) -> None:
            if call == 11:
                os.kill(launcher, signal.SIGINT)

        if rank == 1:
            before(DeepSpeedEngine, "_run", ask)
        del attempt

    outcome = supervise(recipe, ["name=asked"], fault=fault)
    assert (outcome.code, outcome.said) == (75, [])
    run = recipe.parent / "runs/asked"
    stop = events(run)[-1]
    # The launcher's own, though it reaches the ranks as another one.
    assert (stop["event"], stop["signal"]) == ("stop", signal.SIGINT)
    assert read_run(run).outcome == "stopped by Ctrl-C (SIGINT), can be resumed"
    # A second attempt by hand goes on.
    assert supervise(recipe, ["name=asked"], resume=True).code == 0
    assert fingerprint(run) == expected


@pytest.mark.parametrize("terminal", [True, False])
def test_a_stop_that_takes_the_output_away_saves(
    terminal: bool, undisturbed: tuple[Path, str]
) -> None:
    recipe, expected = undisturbed
    launcher, name = os.getpid(), f"name=unheard-{terminal}"

    def fault(attempt: int, rank: int) -> None:
        del attempt
        # A terminal, or the pipe to a `tee` that Ctrl-C ends first.
        reader, writer = pty.openpty() if terminal else os.pipe()
        sys.stderr = os.fdopen(writer, "w", buffering=1)

        def ask(call: int) -> None:
            if call == 11:
                os.close(reader)
                if rank == 1:
                    os.kill(launcher, signal.SIGHUP if terminal else signal.SIGINT)

        before(DeepSpeedEngine, "_run", ask)

    outcome = supervise(recipe, [name, "logging.every=1"], fault=fault)
    assert (outcome.code, outcome.said) == (75, [])
    run = recipe.parent / f"runs/unheard-{terminal}"
    stop = events(run)[-1]
    assert stop["event"] == "stop"
    assert newest_checkpoint(run).name == f"step-{stop['step']:08d}"
    assert supervise(recipe, [name], resume=True).code == 0
    assert fingerprint(run) == expected


def test_a_second_request_to_stop_ends_the_ranks_at_once(
    undisturbed: tuple[Path, str],
) -> None:
    recipe, expected = undisturbed
    launcher = os.getpid()

    def ask_twice(call: int) -> None:
        if call == 11:
            os.kill(launcher, signal.SIGTERM)
            time.sleep(0.6)
            os.kill(launcher, signal.SIGTERM)
            time.sleep(600)

    def fault(attempt: int, rank: int) -> None:
        del attempt
        signals.SAME_REQUEST_S = 0.3
        if rank == 1:
            before(DeepSpeedEngine, "_run", ask_twice)

    outcome = supervise(recipe, ["name=twice", "supervision.timeout_s=600"], fault=fault)
    assert outcome.code == 143
    (said,) = outcome.said
    assert f"ended with exit code {128 + signal.SIGUSR1} (asked to stop a second time)" in said
    assert "not started again: a stop was asked for" in said
    run = recipe.parent / "runs/twice"
    assert events(run)[-1]["event"] != "stop"
    assert supervise(recipe, ["name=twice"], resume=True).code == 0
    assert fingerprint(run) == expected


def test_a_stop_while_a_save_goes_on_into_a_phase_change_loses_nothing(
    undisturbed: tuple[Path, str],
) -> None:
    recipe, expected = undisturbed
    launcher = os.getpid()
    write = saving.write_rank_file

    def fault(attempt: int, rank: int) -> None:
        del attempt

        def write_slowly(*args: Any, **kwargs: Any) -> Any:
            time.sleep(0.5)
            return write(*args, **kwargs)

        saving.write_rank_file = write_slowly
        # The second phase begins at step 8, right after a save has begun.
        if rank == 0:
            before(loop, "enter_phase", lambda call: ask() if call == 2 else None)

    def ask() -> None:
        os.kill(launcher, signal.SIGTERM)

    outcome = supervise(recipe, ["name=changing"], fault=fault)
    assert (outcome.code, outcome.said) == (75, [])
    run = recipe.parent / "runs/changing"
    stopped = events(run)[-1]
    assert stopped["event"] == "stop"
    saved = [e["step"] for e in events(run) if e["event"] == "checkpoint"]
    assert saved == sorted({4, 8, stopped["step"]})
    assert supervise(recipe, ["name=changing"], resume=True).code == 0
    assert fingerprint(run) == expected


def test_the_rank_that_failed_is_named_and_not_tried_for_ever_if_it_fails_in_the_same_way(
    undisturbed: tuple[Path, str],
) -> None:
    recipe, _ = undisturbed

    def fail(call: int) -> None:
        raise RuntimeError(f"a bug in call {call}")

    def fault(attempt: int, rank: int) -> None:
        del attempt
        if rank == 1:
            before(loop, "agree", fail)
            # Meanwhile the other finds the connection broken, says so and ends.
            before(cli, "_report_error", lambda _: time.sleep(0.5))

    outcome = supervise(recipe, ["name=bug"], fault=fault, max_restarts=9)
    assert outcome.code == 1
    assert len(outcome.said) == 3
    for said in outcome.said[:2]:
        assert said.startswith("rank 1 ended with exit code 1 (a bug in call 1)")
    assert outcome.said[-1] == "failed twice in the same way: not started again"


def _wait_for(condition: Callable[[], bool], *, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_launcher_leaves_no_ranks_and_its_run_is_locked_until_then(
    undisturbed: tuple[Path, str], capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, expected = undisturbed
    run = recipe.parent / "runs/orphans"
    mark = recipe.parent / "sleeping"

    def sleep(call: int) -> None:
        if call == 2:  # a save is being written, and this rank's share is not there yet
            mark.touch()
            time.sleep(600)

    def fault(attempt: int, rank: int) -> None:
        del attempt
        if rank == 1:
            before(saving, "write_rank_file", sleep)

    launcher = os.fork()
    if launcher == 0:
        supervise(recipe, ["name=orphans", "supervision.timeout_s=600"], fault=fault)
        os._exit(0)
    try:
        _wait_for(mark.exists)
        ranks = psutil.Process(launcher).children()
        assert len(ranks) == 2
        # A second writer is refused, by every rank, while the first one lives; said once.
        refused = [recipe.parent / f"refused-{rank}" for rank in (0, 1)]

        def note(attempt: int, rank: int) -> None:
            del attempt
            before(cli, "_report_error", lambda _: refused[rank].touch())

        second = supervise(recipe, ["name=orphans"], fault=note, resume=True)
        assert second.code == 2
        assert all(mark.exists() for mark in refused)
        said = capfd.readouterr().err
        found = re.findall(r"\[rank [01]\] error: .*is being written by another run", said)
        assert len(found) == said.count("] error: ") == 1
    finally:
        os.kill(launcher, signal.SIGKILL)
        os.waitpid(launcher, 0)
    _wait_for(lambda: not any(r.is_running() and r.status() != "zombie" for r in ranks), seconds=5)
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        ".tmp-step-00000008",
        "step-00000004",
    ]
    assert supervise(recipe, ["name=orphans"], resume=True).code == 0
    assert fingerprint(run) == expected


def test_a_missing_rank_is_named(undisturbed: tuple[Path, str]) -> None:
    recipe, _ = undisturbed

    def fault(attempt: int, rank: int) -> None:
        del attempt
        if rank == 1:
            os._exit(0)  # it never joins, and nobody sees it fail

    outcome = supervise(
        recipe, ["name=alone", "engine.join_timeout_s=1"], fault=fault, max_restarts=0
    )
    assert outcome.code == 1
    assert "rank 0 ended with exit code 1 (rank 1 of 2 did not come to" in outcome.said[0]
    log = (recipe.parent / "runs/alone/logs/supervisor.log").read_text()
    assert outcome.said[0] in log
