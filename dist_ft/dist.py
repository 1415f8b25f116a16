"""Ranks: who am I, and the few collectives that the trainer needs."""

from __future__ import annotations

import datetime
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

T = TypeVar("T")
# Whether other ranks are left out; see `alone`.
_ALONE: ContextVar[bool] = ContextVar("alone", default=False)
# Environment variables that say which rank this is.
_PLACE = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE")
# Who adds numbers in host memory up, where the default group is a caller's for GPUs only.
_HOST_GROUP: ContextVar[Any] = ContextVar("host_group", default=None)
# Between looks at whether the store of an earlier start is gone.
_STORE_PAUSE_S = 0.5


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


@contextmanager
def alone() -> Iterator[None]:
    """Leave the other ranks of a process group that is there out of what is done inside."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def init_process_group(world: World, *, timeout_s: int, join_timeout_s: int) -> torch.device:
    """Join the default process group and return this rank's device.

    Args:
        world: This process's place.
        timeout_s: Seconds after which a collective that a rank never joins is an error.
        join_timeout_s: Seconds until all ranks must be there.

    Raises:
        RuntimeError: If some never come, naming them.
        ValueError: If DeepSpeed is told another device than this one: it would move the weights.
    """
    use_cuda = torch.cuda.is_available()
    if use_cuda and os.environ.get("DS_ACCELERATOR") == "cpu":
        raise ValueError(
            "DS_ACCELERATOR: must be the device that torch uses, got cpu where torch finds a GPU: "
            "unset it, or hide the GPUs (CUDA_VISIBLE_DEVICES='')"
        )
    if use_cuda:
        torch.cuda.set_device(world.local_rank)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        timeout = datetime.timedelta(seconds=timeout_s)
        if world.world_size == 1 or "TORCHELASTIC_RUN_ID" in os.environ:
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            os.environ.setdefault("MASTER_PORT", "0" if world.world_size == 1 else "29500")
            os.environ.setdefault("RANK", str(world.rank))
            os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
            os.environ.setdefault("WORLD_SIZE", str(world.world_size))
            dist.init_process_group(backend, timeout=timeout)
        else:
            store = _meet(world, join_timeout_s=join_timeout_s)
            dist.init_process_group(
                backend, store=store, rank=world.rank, world_size=world.world_size, timeout=timeout
            )
    return torch.device("cuda", world.local_rank) if use_cuda else torch.device("cpu")


@contextmanager
def process_group(world: World, *, timeout_s: int, join_timeout_s: int) -> Iterator[torch.device]:
    """Yield this rank's device, in the default process group; see `init_process_group`.

    A group that was there before stays. What else this process starts later, another trainer in a
    notebook, must not find the place of a rank in its environment.
    """
    was_there, before = dist.is_initialized(), {n: os.environ.get(n) for n in _PLACE}
    host: Any = None
    try:
        device = init_process_group(world, timeout_s=timeout_s, join_timeout_s=join_timeout_s)
        if was_there and dist.get_backend_config() == "cuda:nccl":
            host = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
        _HOST_GROUP.set(host)
        yield device
    finally:
        _HOST_GROUP.set(None)
        if host is not None:
            dist.destroy_process_group(host)
        if not was_there:
            shut_down()
        for name in (n for n, value in before.items() if value is None):
            os.environ.pop(name, None)


def _meet(world: World, *, join_timeout_s: float) -> TCPStore:
    """Return the store of all ranks once every rank is there.

    torch says only how many are missing; who looks for a lost node wants to know which.

    Raises:
        RuntimeError: If the store can't be reached, or ranks never come, naming them.
    """
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = int(os.environ.get("MASTER_PORT", "29500"))
    deadline = time.monotonic() + join_timeout_s
    store = _open_store(world, address, port, deadline=deadline)
    missing: list[int] = []
    for rank in range(world.world_size):
        left = max(0.1, deadline - time.monotonic())
        try:
            store.wait([_joined(rank)], datetime.timedelta(seconds=left))
        except RuntimeError:
            missing.append(rank)
    if missing:
        raise RuntimeError(
            f"rank {', '.join(map(str, missing))} of {world.world_size} did not come to "
            f"{address}:{port} within {join_timeout_s:g} s: look at the logs of that rank and node"
        )
    return store


def _open_store(world: World, address: str, port: int, *, deadline: float) -> TCPStore:
    """Return the store of this attempt, which this rank has joined.

    A rank 0 of the attempt before may live on for a while on another node, in its last micro-batch
    or waiting for a dead peer, and its store with it, where all ranks have come long ago.
    """
    while True:
        left = max(0.1, deadline - time.monotonic())
        try:
            store = TCPStore(
                address,
                port,
                world.world_size,
                is_master=world.is_main,
                timeout=datetime.timedelta(seconds=left),
                wait_for_workers=False,
            )
            if store.add(f"dist_ft/came/{world.rank}", 1) == 1:
                store.set(_joined(world.rank), socket.gethostname())
                return store
            error = f"rank {world.rank} had come there before"
        except RuntimeError as problem:
            error = str(problem).splitlines()[0]
            if world.is_main or time.monotonic() > deadline:
                action = "open" if world.is_main else "reach rank 0 at"
                raise RuntimeError(
                    f"rank {world.rank} on {socket.gethostname()} cannot {action} {address}:{port} "
                    f"({error}): is the port free and rank 0 running?"
                ) from problem
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"rank {world.rank} on {socket.gethostname()} found only ranks of an earlier start "
                f"at {address}:{port} ({error}): end what still runs on that node, or give every "
                "node a NODE_RANK of its own"
            )
        time.sleep(_STORE_PAUSE_S)


def _joined(rank: int) -> str:
    return f"dist_ft/joined/{rank}"


def is_distributed() -> bool:
    """Return whether more than one rank takes part."""
    there = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return there and not _ALONE.get()


def rank() -> int:
    """Return this process's rank, 0 outside a process group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of ranks, 1 outside a process group."""
    return dist.get_world_size() if is_distributed() else 1


def all_reduce_sum(values: list[float]) -> list[float]:
    """Return the sums over ranks, in float64, the same on every rank."""
    if not is_distributed():
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, group=_HOST_GROUP.get())
    return tensor.tolist()


def sum_over_ranks(tensor: Tensor) -> None:
    """Replace a tensor by its sum over ranks, in place."""
    if is_distributed():
        dist.all_reduce(tensor, group=_HOST_GROUP.get() if tensor.is_cpu else None)


def all_reduce_max(values: list[int]) -> list[int]:
    """Return the largest of each integer over ranks, the same on every rank."""
    if not is_distributed():
        return values
    tensor = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_HOST_GROUP.get())
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


def on_main(action: Callable[[], T]) -> T:
    """Return what `action` returns on rank 0, on every rank; only rank 0 runs it.

    Raises:
        ValueError: On every rank, if the action raised it: otherwise the others would wait in
            their first collective.
    """
    value: T | None = None
    problem: str | None = None
    if rank() == 0:
        try:
            value = action()
        except ValueError as error:
            problem = str(error)
    value, problem = broadcast_object((value, problem))
    if problem is not None:
        raise ValueError(problem)
    return value  # pyright: ignore[reportReturnType] - rank 0's own


def barrier() -> None:
    """Wait until every rank has come here."""
    if is_distributed():
        dist.barrier()


def shut_down() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
