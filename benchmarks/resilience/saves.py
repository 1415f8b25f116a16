"""Saves: kills while one follows the other, and how long training waits for one."""

from __future__ import annotations

import json
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

from benchmarks.resilience import trainer_worker
from dist_ft.engine.base import EngineState, StateSlice
from dist_ft.train.checkpoint import find_checkpoint
from dist_ft.train.retention import Retention
from dist_ft.train.saving import CheckpointWriter, save_checkpoint

# Half of MiniLM's 22.7 million parameters: what one of two ranks holds.
_TENSORS, _ELEMENTS = 60, 190_000
_PRODUCTS = 24


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


def trainer_saves(root: Path) -> None:
    """Let transformers' Trainer save after every step, without end."""
    trainer_worker.work(root, save_every=1, pause_s=0.0)


def trainer_is_usable(root: Path) -> bool:
    """Return whether all files of the checkpoint that the Trainer would resume from can be read."""
    from safetensors.torch import load_file
    from transformers.trainer_utils import get_last_checkpoint

    newest = get_last_checkpoint(str(root / "trainer")) if (root / "trainer").is_dir() else None
    if newest is None:
        return False
    folder = Path(newest)
    try:
        load_file(folder / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.load(folder / name, weights_only=False)
        json.loads((folder / "trainer_state.json").read_text())
    except Exception:  # noqa: BLE001 - whatever a damaged file raises
        return False
    return True


@dataclass(frozen=True)
class Kills:
    """Of `kills`, how many left nothing that can be resumed from."""

    kills: int
    unusable: int


def kill_while_saving(
    save: Callable[[Path], None], usable: Callable[[Path], bool], *, kills: int
) -> Kills:
    """Kill a process that saves back to back, again and again in the same folder.

    A kill left nothing usable if `usable` says so, or if the next process can't go on from it; the
    folder is emptied then.
    """
    draw = random.Random(3)
    unusable = 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "checkpoints"
        root.mkdir()
        begins, left = True, True  # the folder is empty; what the last kill left can be used
        for _ in range(kills):
            while not _kill_a_saving_process(root, save, usable, draw=draw):
                if begins:
                    raise RuntimeError(f"{save.__name__} ended by itself")
                unusable += left  # it looked usable, and was not
                shutil.rmtree(root)
                root.mkdir()
                begins = True
            begins = False
            left = usable(root)
            unusable += not left
    return Kills(kills, unusable)


def _kill_a_saving_process(
    root: Path,
    save: Callable[[Path], None],
    usable: Callable[[Path], bool],
    *,
    draw: random.Random,
) -> bool:
    """Start it, let it save and kill it; return False if it ended by itself before."""
    Path(f"{root}.store").unlink(missing_ok=True)
    before = _newest(root)
    pid = os.fork()
    if pid == 0:
        try:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            os.dup2(devnull, 2)
            save(root)
        finally:  # whatever it raises must not unwind the parent's frames
            os._exit(1)
    # Until this process has begun to save, and the very first one has saved something.
    while _newest(root) == before or (before is None and not usable(root)):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    time.sleep(draw.uniform(0.0, 0.15))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def _newest(root: Path) -> Any:
    return max(((p.lstat().st_mtime_ns, p.name) for p in root.glob("*")), default=None)


@dataclass(frozen=True)
class Stall:
    """Medians over saves, seconds.

    Attributes:
        synchronous_s: A save that training waits for.
        stall_s: What training waits for a save in the background.
        slowdown_s: What the steps that run beside it take longer, that wait included: a save takes
            cores and memory bandwidth from a training on CPUs.
        save_s: From the call until the checkpoint exists.
        step_s: A step without a save.
        bytes: Size of the checkpoint.
    """

    synchronous_s: float
    stall_s: float
    slowdown_s: float
    save_s: float
    step_s: float
    bytes: int


def measure_stall(*, saves: int) -> Stall:
    """Return how long training waits for a save in the background, and for a synchronous one.

    A step is matrix products of 1.6e10 operations, a quarter of those of the model whose state is
    saved (MiniLM's blocks, 8 rows of 128 tokens a rank: 6 x 10.6e6 x 1024); at its end the state
    changes, as an update does.
    """
    held = state()
    changed = held.slices[0].values["weight"]
    factor = torch.randn(700, 700)
    steps: list[float] = []
    whole: list[float] = []
    background: list[tuple[float, float, float]] = []
    size = 0
    root = Path(tempfile.mkdtemp())
    try:
        writer = CheckpointWriter(root, retention=Retention())
        writer.prepare(held)

        def take_step() -> float:
            began = time.monotonic()
            for _ in range(_PRODUCTS):
                _ = factor @ factor
            writer.copied()
            changed.add_(1e-3)
            return time.monotonic() - began

        for step in range(1, 2 * saves + 1):
            steps.append(take_step())
            if step % 2:
                began = time.monotonic()
                save_checkpoint(root, step=step, state=held, trainer={})
                whole.append(time.monotonic() - began)
                continue
            began, done = time.monotonic(), 0
            writer.begin(step=step, state=held, trainer={})
            saved = None
            while saved is None:
                take_step()
                done += 1
                saved = writer.poll()
            slower = time.monotonic() - began - done * statistics.median(steps)
            background.append((saved.stall_s, slower, saved.save_s))
            size = saved.bytes
    finally:
        shutil.rmtree(root)
    stall_s, slowdown_s, save_s = (statistics.median(v) for v in zip(*background, strict=True))
    return Stall(
        statistics.median(whole), stall_s, slowdown_s, save_s, statistics.median(steps), size
    )
