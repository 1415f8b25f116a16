"""Ranks: who am I, and the few collectives that the trainer needs."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process's place among the ranks."""

    rank: int
    local_rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that writes what all ranks agree on."""
        return self.rank == 0


def world_from_environment() -> World:
    """Return the place that torchrun (or nobody: one process) gave this process."""
    return World(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
    )


def init_process_group(world: World, *, timeout_s: int) -> torch.device:
    """Join the default process group and return this rank's device.

    Args:
        world: This process's place.
        timeout_s: Seconds after which a collective that a rank never joins is an error.
    """
    use_cuda = torch.cuda.is_available()
    if use_cuda:
        torch.cuda.set_device(world.local_rank)
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0" if world.world_size == 1 else "29500")
        os.environ.setdefault("RANK", str(world.rank))
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
        os.environ.setdefault("WORLD_SIZE", str(world.world_size))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if use_cuda else "gloo",
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    return torch.device("cuda", world.local_rank) if use_cuda else torch.device("cpu")


def is_distributed() -> bool:
    """Return whether more than one rank takes part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Return this process's rank, 0 outside a process group."""
    return dist.get_rank() if is_distributed() else 0


def all_reduce_sum(values: list[float]) -> list[float]:
    """Return the sums over ranks, in float64, the same on every rank."""
    if not is_distributed():
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.tolist()


def all_reduce_max(values: list[int]) -> list[int]:
    """Return the largest of each integer over ranks, the same on every rank."""
    if not is_distributed():
        return values
    tensor = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def all_gather_object(value: Any) -> list[Any]:
    """Return every rank's value, by rank."""
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait until every rank has come here."""
    if is_distributed():
        dist.barrier()


def shut_down() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
