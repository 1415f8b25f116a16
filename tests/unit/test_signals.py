"""What asked a run to stop is told by the name that its user knows."""

import os
import signal
from pathlib import Path

import pytest

from dist_ft.heartbeat import FOLDER, note_request
from dist_ft.train.signals import StopRequest, stop_name


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (signal.SIGINT, "Ctrl-C (SIGINT)"),
        (signal.SIGTERM, "SIGTERM"),
        (signal.SIGHUP, "the end of its terminal (SIGHUP)"),
        (signal.SIGUSR1, "SIGUSR1 (as schedulers send it)"),
        (77, "signal 77"),
        (None, "a signal"),
    ],
)
def test_signals_have_names(number: int | None, name: str) -> None:
    assert stop_name(number) == name


@pytest.mark.parametrize(
    ("launcher", "sent", "kept"),
    [
        (signal.SIGINT, signal.SIGUSR1, signal.SIGINT),  # passed on
        (signal.SIGUSR1, signal.SIGUSR1, signal.SIGUSR1),  # Slurm signals launcher and ranks
        (None, signal.SIGUSR1, signal.SIGUSR1),  # the rank is the first to hear of it
        (signal.SIGINT, signal.SIGTERM, signal.SIGTERM),  # to the rank itself
    ],
)
def test_a_rank_knows_what_its_launcher_was_sent(
    launcher: int | None, sent: int, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    if launcher is not None:
        note_request(tmp_path, launcher)
    stop = StopRequest()
    with stop.listening():
        os.kill(os.getpid(), sent)
    assert stop.signal == kept
