"""The same fault for plain torchrun with DeepSpeed's own checkpoints. Run by torchrun as a worker.

`trial` starts it; as a program this file is the worker: it trains a small model, saves every 20
steps, loads what it finds when it starts, and writes a line for each step.
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
from pathlib import Path

import psutil

SAVE_EVERY = 20
_PATIENCE_S = 45.0


def trial(*, seed: int) -> tuple[bool, float | None]:
    """Kill one of two workers once; return whether training goes on, and after how many seconds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        agent = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2",
             "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--max-restarts=3",
             __file__, name],
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            return _kill_one(agent, folder / "steps.txt", draw=random.Random(seed))
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has given up
                for child in psutil.Process(agent.pid).children(recursive=True):
                    child.kill()
            agent.kill()
            agent.wait()


def _kill_one(
    agent: subprocess.Popen[bytes], steps: Path, *, draw: random.Random
) -> tuple[bool, float | None]:
    deadline = time.monotonic() + 2 * _PATIENCE_S
    while _lines(steps) < 2 * SAVE_EVERY:
        if time.monotonic() > deadline:
            return False, None
        time.sleep(0.05)
    time.sleep(draw.uniform(0, 0.5))
    workers = psutil.Process(agent.pid).children()
    os.kill(draw.choice(workers).pid, signal.SIGKILL)
    killed = time.monotonic()
    time.sleep(0.5)  # what the survivor still writes
    before = _lines(steps)
    while time.monotonic() - killed < _PATIENCE_S and agent.poll() is None:
        if _lines(steps) > before:
            return True, time.monotonic() - killed
        time.sleep(0.05)
    return False, None


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def work(folder: Path) -> None:
    """Train without end."""
    import deepspeed
    import torch

    deepspeed.init_distributed("gloo")
    model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.Linear(1024, 256))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters()),
        config={"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 1},
                "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False},
    )  # fmt: skip
    if (folder / "latest").exists():
        engine.load_checkpoint(str(folder))
    while True:
        loss = engine(torch.randn(8, 256)).square().mean()
        engine.backward(loss)
        engine.step()
        time.sleep(0.02)
        if engine.global_rank == 0:
            with (folder / "steps.txt").open("a") as file:
                file.write(f"{engine.global_steps}\n")
        if engine.global_steps % SAVE_EVERY == 0:
            engine.save_checkpoint(str(folder))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
