"""The same fault for what others use: torchrun with restarts, and checkpoints of DeepSpeed or HF.

A worker (`deepspeed_worker.py`, `trainer_worker.py`) trains, saves every `SAVE_EVERY` steps, goes
on from what it finds when it starts, and writes the number of each step into ``steps.txt``.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

SAVE_EVERY = 20
_PATIENCE_S = 45.0


@dataclass(frozen=True)
class Trial:
    """What became of a run whose worker was killed, in seconds from the kill.

    Attributes:
        survived: Whether it trains again.
        detect_s: Until the other worker was ended, too.
        restart_s: Until both run again.
        first_step_s: Until a step is done that was not done before the kill, or done again.
        steps_lost: Steps that are done twice.
        step_s: A step before the kill.
    """

    survived: bool
    detect_s: float | None = None
    restart_s: float | None = None
    first_step_s: float | None = None
    steps_lost: int | None = None
    step_s: float = 0.0


def trial(worker: str, *, seed: int) -> Trial:
    """Kill one of two workers of a script in this folder once; return what becomes of the run."""
    with tempfile.TemporaryDirectory() as name:
        agent = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2",
             "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--max-restarts=3",
             str(Path(__file__).with_name(worker)), name],
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            return _kill_one(agent, Path(name) / "steps.txt", draw=random.Random(seed))
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has given up
                for child in psutil.Process(agent.pid).children(recursive=True):
                    child.kill()
            agent.kill()
            agent.wait()


def _kill_one(agent: subprocess.Popen[bytes], steps: Path, *, draw: random.Random) -> Trial:
    process = psutil.Process(agent.pid)
    if not _within(2 * _PATIENCE_S, lambda: len(_steps(steps)) >= 2 * SAVE_EVERY, agent):
        return Trial(survived=False)
    began, before = time.monotonic(), len(_steps(steps))
    time.sleep(draw.uniform(0.5, 1.0))
    step_s = (time.monotonic() - began) / max(1, len(_steps(steps)) - before)
    workers = process.children()
    old = {w.pid for w in workers}
    os.kill(draw.choice(workers).pid, signal.SIGKILL)
    killed = time.monotonic()
    gone = _within(_PATIENCE_S, lambda: not any(_runs(w) for w in workers), agent)
    detected = time.monotonic() - killed
    done = _steps(steps)
    if not gone or not _within(_PATIENCE_S, lambda: len(_new(process, old)) == 2, agent):
        return Trial(survived=False, detect_s=detected if gone else None, step_s=step_s)
    restarted = time.monotonic() - killed
    if not _within(_PATIENCE_S, lambda: len(_steps(steps)) > len(done), agent):
        return Trial(survived=False, detect_s=detected, restart_s=restarted, step_s=step_s)
    first = _steps(steps)[len(done)]
    return Trial(
        survived=True, detect_s=detected, restart_s=restarted,
        first_step_s=time.monotonic() - killed, steps_lost=done[-1] - first + 1, step_s=step_s,
    )  # fmt: skip


def _within(seconds: float, condition: Callable[[], bool], agent: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and agent.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            if condition():
                return True
        time.sleep(0.02)
    return False


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _new(agent: psutil.Process, old: set[int]) -> list[psutil.Process]:
    return [child for child in agent.children() if child.pid not in old and _runs(child)]


def _steps(path: Path) -> list[int]:
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [int(line) for line in lines]
