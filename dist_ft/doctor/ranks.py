"""How fast ranks exchange numbers: all-reduces between two local ranks, or between a launcher's."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from dist_ft.doctor.findings import Finding
from dist_ft.launcher.processes import Process, StartRank, fork_rank, run_rank

# Of the tensor that is reduced: what a bucket of gradients is on either device.
ALL_REDUCE_MIB = {"cpu": 16, "cuda": 256}
LOCAL_RANKS_S = 60
JOIN_S = 60
_RESULT, _ERROR = "all-reduce.json", "error."
_REPEATS = 5
# Half of what gigabit Ethernet (CPU) or ten-gigabit Ethernet (GPU) carries, MB/s.
_SLOW_MB_S = {"cpu": 60.0, "cuda": 600.0}


@dataclass(frozen=True)
class AllReduce:
    """What all-reduces took, on the slowest rank.

    Attributes:
        backend: "gloo" or "nccl".
        device: "cpu" or "cuda".
        ranks: How many took part.
        hosts: On how many machines.
        mib: Size of the tensor of each rank, MiB.
        seconds: Median for the tensor.
        latency_s: Median for a single number.
    """

    backend: str
    device: str
    ranks: int
    hosts: int
    mib: int
    seconds: float
    latency_s: float

    @property
    def bus_mb_s(self) -> float:
        """Megabytes a second over each rank's link, in one direction.

        A rank of a ring all-reduce sends 2 (n - 1) / n of the tensor; nccl-tests calls this the bus
        bandwidth, and it does not depend on the number of ranks.
        """
        return 2 * (self.ranks - 1) / self.ranks * self.mib * 2**20 / 1e6 / self.seconds


def between_ranks() -> Iterator[Finding]:
    """Yield the speed of an all-reduce between this launcher's ranks, or two of this machine."""
    from dist_ft import dist

    world = dist.world_from_environment()
    if world.world_size == 1:
        yield _finding(_between_local_ranks())
        return
    device = dist.init_process_group(world, timeout_s=JOIN_S, join_timeout_s=JOIN_S)
    try:
        yield _finding(measure_all_reduce(device.type))
    finally:
        dist.shut_down()


def _finding(measured: AllReduce) -> Finding:
    name = f"{measured.backend} between ranks"
    where = "this machine" if measured.hosts == 1 else f"{measured.hosts} machines"
    text = (
        f"{measured.bus_mb_s:,.0f} MB/s (all-reduce of {measured.mib} MiB by {measured.ranks} "
        f"ranks of {where}: {1e3 * measured.seconds:.1f} ms; of one number: "
        f"{1e3 * measured.latency_s:.2f} ms)"
    )
    if measured.bus_mb_s >= _SLOW_MB_S[measured.device]:
        return Finding(name, text)
    remedy = (
        "gradients will wait: name the fast interface by GLOO_SOCKET_IFNAME and "
        "NCCL_SOCKET_IFNAME; engine.zero_stage 1 or 2 sends less than 3"
        if measured.hosts > 1
        else "other jobs use the cores, or GPUs lack a direct link (nvidia-smi topo -m)"
    )
    return Finding(name, text, "note", remedy)


def measure_all_reduce(device: str) -> AllReduce:
    """Return what an all-reduce takes in the process group that there is; all ranks call it.

    Args:
        device: "cpu" or "cuda", the kind of memory that is reduced.

    Raises:
        RuntimeError: If the sums are wrong.
    """
    import torch
    import torch.distributed as dist

    ranks, rank = dist.get_world_size(), dist.get_rank()
    place = torch.device(device, torch.cuda.current_device()) if device == "cuda" else "cpu"
    mib = ALL_REDUCE_MIB[device]
    expected = ranks * (ranks + 1) / 2
    medians: list[float] = []
    for elements in (mib * 2**18, 1):
        seconds: list[float] = []
        for _ in range(_REPEATS + 1):
            block = torch.full((elements,), float(rank + 1), device=place)
            seconds.append(_timed_all_reduce(block))
            if float(block[-1]) != expected or float(block[0]) != expected:
                raise RuntimeError(
                    f"an all-reduce over {ranks} ranks returned {float(block[0])} on rank {rank} "
                    f"instead of {expected}: memory or network damages data, leave the node out"
                )
        slowest = torch.tensor(seconds[1:], dtype=torch.float64, device=place)  # without the first
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        medians.append(median(slowest.tolist()))
    hosts: list[Any] = [None] * ranks
    dist.all_gather_object(hosts, socket.gethostname())
    backend = "nccl" if device == "cuda" else "gloo"
    return AllReduce(backend, device, ranks, len(set(hosts)), mib, *medians)


def _timed_all_reduce(block: Any) -> float:
    import torch
    import torch.distributed as dist

    dist.barrier()
    if block.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    dist.all_reduce(block)
    if block.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _between_local_ranks() -> AllReduce:
    """Measure between new processes of this machine: a rank for each GPU, or two on the CPU.

    Raises:
        RuntimeError: If a rank fails, or they do not end in time.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device, ranks = ("cuda", gpus) if gpus > 1 else ("cpu", 2)
    with tempfile.TemporaryDirectory() as folder:
        started = [
            _start(LocalRank(rank, ranks, device, folder), forked=gpus == 0)({})
            for rank in range(ranks)
        ]
        try:
            _wait_for(started, folder=Path(folder))
        finally:
            for process in started:
                if process.poll() is None:
                    os.kill(process.pid, signal.SIGKILL)
        return AllReduce(**json.loads((Path(folder) / _RESULT).read_text()))


@dataclass(frozen=True)
class LocalRank:
    """One of the processes that measure on this machine.

    Attributes:
        rank: This process's.
        ranks: How many there are.
        device: "cpu" or "cuda".
        folder: Where they meet, and where the result or an error goes.
    """

    rank: int
    ranks: int
    device: str
    folder: str


def _start(place: LocalRank, *, forked: bool) -> StartRank:
    """Return what starts a rank: a fork, which need not import torch, or with GPUs a program."""
    if forked:
        return fork_rank(lambda: be_a_local_rank(place), listens=False)
    program = (
        "import json, sys; from dist_ft.doctor.ranks import LocalRank, be_a_local_rank; "
        "sys.exit(be_a_local_rank(LocalRank(**json.loads(sys.argv[1]))))"
    )
    return run_rank([sys.executable, "-c", program, json.dumps(asdict(place))], listens=False)


def _wait_for(started: Sequence[Process], *, folder: Path) -> None:
    deadline = time.monotonic() + LOCAL_RANKS_S
    while True:
        codes = [process.poll() for process in started]
        for rank, code in enumerate(codes):
            if code:
                error = folder / f"{_ERROR}{rank}"
                why = error.read_text() if error.is_file() else f"exit code {code}"
                raise RuntimeError(f"rank {rank} of {len(started)} local ranks failed: {why}")
        if None not in codes:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{len(started)} local ranks did not exchange numbers within {LOCAL_RANKS_S} s: "
                "GPUs that can't reach each other need NCCL_P2P_DISABLE=1, an interface that does "
                "not work another GLOO_SOCKET_IFNAME"
            )
        time.sleep(0.02)


def be_a_local_rank(place: LocalRank) -> int:
    """Measure as one of the processes that `between_ranks` starts, and return its exit code.

    Rank 0 leaves the result in the folder; whoever fails leaves the reason.
    """
    import torch
    import torch.distributed as dist

    folder = Path(place.folder)
    torch.set_num_threads(1)
    try:
        if place.device == "cuda":
            torch.cuda.set_device(place.rank)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if place.device == "cuda" else "gloo",
            init_method=f"file://{folder}/store",
            rank=place.rank,
            world_size=place.ranks,
            timeout=timedelta(seconds=LOCAL_RANKS_S),
        )
        measured = measure_all_reduce(place.device)
        dist.destroy_process_group()
    except (RuntimeError, OSError, ValueError) as error:
        (folder / f"{_ERROR}{place.rank}").write_text(" ".join(str(error).split())[:300])
        return 1
    if place.rank == 0:
        (folder / _RESULT).write_text(json.dumps(asdict(measured)))
    return 0
