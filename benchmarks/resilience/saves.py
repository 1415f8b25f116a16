"""Saves: kills while one follows the other, and how long training waits for one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_ft.engine.base import EngineState, StateSlice
from dist_ft.train.checkpoint import find_checkpoint
from dist_ft.train.retention import Retention
from dist_ft.train.saving import CheckpointWriter, save_checkpoint

# Half of MiniLM's 22.7 million parameters: what one of two ranks holds.
_TENSORS, _ELEMENTS = 60, 190_000


def state(*, elements: int = _ELEMENTS) -> EngineState:
    """Return weights and moments of one rank."""
    torch.manual_seed(0)
    slices = [
        StateSlice(
            f"p{i}", 0, {k: torch.randn(elements) for k in ("weight", "exp_avg", "exp_avg_sq")}
        )
        for i in range(_TENSORS)
    ]
    return EngineState(slices, {}, ())


def ours(root: Path) -> None:
    """Save one checkpoint after the other without end, going on where the last process ended."""
    held = state(elements=20_000)
    found, _ = find_checkpoint(root)
    first = 1 if found is None else 1 + int(found.name.removeprefix("step-"))
    for step in range(first, 10**6):
        save_checkpoint(root, step=step, state=held, trainer={})


def ours_is_usable(root: Path) -> bool:
    """Return whether a checkpoint is found."""
    return find_checkpoint(root)[0] is not None


def deepspeed_saves(root: Path) -> None:
    """Save DeepSpeed checkpoints without end, each under a tag of its own; keep the last two."""
    import deepspeed

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo", init_method=f"file://{root}.store", rank=0, world_size=1)
    model = torch.nn.Linear(1000, 1200)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters()),
        config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1},
                "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False},
        dist_init_required=False,
    )  # fmt: skip
    first = 1 + max((int(p.name) for p in root.glob("[0-9]*")), default=0)
    for step in range(first, 10**6):
        engine.save_checkpoint(str(root), tag=str(step))
        shutil.rmtree(root / str(step - 2), ignore_errors=True)


def deepspeed_is_usable(root: Path) -> bool:
    """Return whether the checkpoint that `latest` names can be read."""
    try:
        tag = (root / "latest").read_text().strip()
        files = list((root / tag).glob("*.pt"))
        for path in files:
            torch.load(path, weights_only=False)
    except (OSError, RuntimeError, EOFError, ValueError):
        return False
    return len(files) == 2


@dataclass(frozen=True)
class Kills:
    """Of `kills`, how many left nothing that can be resumed from."""

    kills: int
    unusable: int


def kill_while_saving(
    save: Callable[[Path], None], usable: Callable[[Path], bool], *, kills: int
) -> Kills:
    """Kill a process that saves back to back, again and again in the same folder."""
    draw = random.Random(3)
    unusable = 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "checkpoints"
        root.mkdir()
        for _ in range(kills):
            Path(f"{root}.store").unlink(missing_ok=True)
            pid = os.fork()
            if pid == 0:
                devnull = os.open(os.devnull, os.O_WRONLY)
                os.dup2(devnull, 1)
                os.dup2(devnull, 2)
                save(root)
            before = _newest(root)
            # Until this process has begun to save, and the very first one has saved something.
            while _newest(root) == before or (before is None and not usable(root)):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    raise RuntimeError(f"{save.__name__} ended by itself")
                time.sleep(0.002)
            time.sleep(draw.uniform(0.0, 0.15))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            unusable += not usable(root)
    return Kills(kills, unusable)


def _newest(root: Path) -> Any:
    return max(((p.stat().st_mtime_ns, p.name) for p in root.glob("*")), default=None)


@dataclass(frozen=True)
class Stall:
    """Medians over saves, seconds."""

    synchronous_s: float
    stall_s: float
    save_s: float
    bytes: int


def measure_stall(*, saves: int) -> Stall:
    """Return how long training waits for a save in the background, and for a synchronous one."""
    held = state()
    whole: list[float] = []
    stalls: list[float] = []
    lasted: list[float] = []
    size = 0
    root = Path(tempfile.mkdtemp())
    try:
        writer = CheckpointWriter(root, retention=Retention())
        writer.prepare(held)
        work = torch.randn(400, 400)
        for step in range(1, 2 * saves + 1):
            if step % 2:
                began = time.monotonic()
                save_checkpoint(root, step=step, state=held, trainer={})
                whole.append(time.monotonic() - began)
                continue
            writer.begin(step=step, state=held, trainer={})
            saved = None
            while saved is None:
                _ = work @ work
                saved = writer.poll()
            stalls.append(saved.stall_s)
            lasted.append(saved.save_s)
            size = saved.bytes
    finally:
        shutil.rmtree(root)
    return Stall(
        statistics.median(whole), statistics.median(stalls), statistics.median(lasted), size
    )
