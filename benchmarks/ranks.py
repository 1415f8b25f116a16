"""Forked gloo ranks of this machine, and what the first of them returns."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

# Before torch and DeepSpeed: the ranks share the cores, and nothing is fetched.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

# Imports sympy, which takes seconds; here once, and not in every forked rank.
import torch._inductor.compile_fx  # pyright: ignore[reportUnusedImport]
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

T = TypeVar("T")


def on_ranks(function: Callable[..., T], *arguments: Any, world_size: int = 2) -> T:
    """Call a function on each rank and return what it returns on rank 0.

    Forked from a process that has imported everything, a run starts in a fraction of a second; a
    launcher takes longer to import than most of the runs here last. One thread a rank.

    Raises:
        torch.multiprocessing.ProcessRaisedException: If a rank raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer"
        start_processes(
            _rank_main,
            args=(world_size, free_port(), str(answer), function, arguments),
            nprocs=world_size,
            start_method="fork",
        )
        return pickle.loads(answer.read_bytes())


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    answer: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    dist.init_process_group("gloo")
    value = function(*arguments)
    if rank == 0:
        Path(answer).write_bytes(pickle.dumps(value))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def free_port() -> int:
    """Return a TCP port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
