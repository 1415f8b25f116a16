"""Devices, network, memory, disks and clock of this machine, each with what would break a run."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from dist_ft.doctor.findings import Finding, Status
from dist_ft.doctor.places import existing

_GIB = 2**30
_LITTLE_DISK_GIB = 5.0
_NO_DISK_GIB = 0.5
_SLOW_DISK_MB_S = 50.0
_LITTLE_MEMORY_GIB = 4.0
_SLOW_LOOKUP_S = 2.0
_PROBE_MB = 32
_CLOCK_SKEW_S = 30.0
_COPY_MB, _COPIES = 128, 3
_SLOW_HOST_GB_S = 1.0
# GPUs of a node share switches; half of the best one's speed is a lane that does not work.
_SLOW_GPU_SHARE = 0.5


def devices() -> Iterator[Finding]:
    """Yield cores and GPUs."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("CPU cores", str(cores))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = f"{properties.total_memory / _GIB:.0f} GiB"
            yield Finding(f"GPU {index}", f"{properties.name}, {memory}")
        if not torch.cuda.is_bf16_supported():
            yield Finding("bf16", "not supported by the GPU", "note", "engine.precision=fp16")
        return
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        remedy = "install a CUDA build of torch, or ignore it and train on the CPU"
        yield Finding("GPU", "driver found, but torch is a CPU build", "note", remedy)
    elif shutil.which("nvidia-smi"):
        remedy = "update the driver, or check CUDA_VISIBLE_DEVICES"
        yield Finding("GPU", f"torch for CUDA {torch.version.cuda} sees none", "broken", remedy)
    else:
        yield Finding("GPU", "none, training runs on the CPU")


def backends() -> Iterator[Finding]:
    """Yield the communication backends, gloo after trying it."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        yield Finding("torch.distributed", "absent", "broken", "install another build of torch")
        return
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            dist.all_reduce(torch.ones(4))
        finally:
            dist.destroy_process_group()
    yield Finding("gloo", f"works ({time.perf_counter() - started:.2f} s to start)")
    if torch.cuda.is_available() and not dist.is_nccl_available():
        remedy = "install torch with NCCL; gloo alone is slow between GPUs"
        yield Finding("nccl", "absent", "broken", remedy)
    elif torch.cuda.is_available():
        from torch.cuda import nccl

        yield Finding("nccl", ".".join(map(str, nccl.version())))


def network() -> Iterator[Finding]:
    """Yield whether other ranks could find this host by its name."""
    name = socket.gethostname()
    started = time.perf_counter()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        remedy = f"add {name} to /etc/hosts; one machine works without"
        yield Finding("host name", f"{name} can't be looked up", "note", remedy)
        return
    seconds = time.perf_counter() - started
    if seconds > _SLOW_LOOKUP_S:
        remedy = f"add {name} to /etc/hosts: ranks look each other up"
        yield Finding("host name", f"{name}, slow look-up ({seconds:.0f} s)", "note", remedy)
    elif address.startswith("127."):
        remedy = "several nodes: export GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME)"
        yield Finding("host name", f"{name} is {address}", "note", remedy)
    else:
        yield Finding("host name", f"{name} is {address}")


def memory() -> Iterator[Finding]:
    """Yield how much memory is free."""
    import psutil

    memory = psutil.virtual_memory()
    available = memory.available / _GIB
    text = f"{available:.1f} of {memory.total / _GIB:.1f} GiB available"
    if available < _LITTLE_MEMORY_GIB:
        remedy = "lower train.micro_batch_size or max_length, or use fewer ranks"
        yield Finding("memory", text, "note", remedy)
    else:
        yield Finding("memory", text)


def disks(folders: Mapping[str, Path]) -> Iterator[Finding]:
    """Yield whether a run can write where it has to, and space, speed and locks of the disks.

    Each disk is measured once.

    Args:
        folders: By what each is for. One that is not there yet stands for the nearest above it.
    """
    measured: dict[int, str] = {}
    for use, folder in folders.items():
        place = existing(folder)
        device = place.stat().st_dev
        name = f"disk of {use}"
        if not os.access(place, os.W_OK | os.X_OK):
            remedy = "set output_dir and data_dir"
            yield Finding(name, f"{folder} can't be written", "broken", remedy)
        elif device in measured:
            yield Finding(name, f"{folder}: the same as of {measured[device]}")
        else:
            measured[device] = use
            yield from _disk(name, folder=folder, place=place)


def _disk(name: str, *, folder: Path, place: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(place).free / _GIB
    text = f"{free:.1f} GiB free in {folder}"
    if free < _NO_DISK_GIB:
        yield Finding(name, text, "broken", "free some space, or set output_dir and data_dir")
        return
    status: Status = "note" if free < _LITTLE_DISK_GIB else "ok"
    remedy = "lower checkpoint.keep_last, or set output_dir" if status == "note" else ""
    yield Finding(name, text, status, remedy)
    written, read = _disk_speed(place)
    slow = min(written, read) < _SLOW_DISK_MB_S
    remedy = "checkpoints and the cache will take long: set a faster disk" if slow else ""
    text = f"{written:,.0f} MB/s written, {read:,.0f} MB/s read ({_PROBE_MB} MiB, to the disk)"
    yield Finding(f"{name}, speed", text, "note" if slow else "ok", remedy)
    if (problem := _lock_problem(place)) is not None:
        remedy = "runs lock their folder: mount the disk with -o flock, or set output_dir"
        yield Finding(f"{name}, locks", problem, "broken", remedy)


def _disk_speed(folder: Path) -> tuple[float, float]:
    """Return the megabytes a second that reach the disk, and that come back from it."""
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        for _ in range(_PROBE_MB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - started
        # Out of the page cache, where the system allows it; what is left is memory's speed.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        file.seek(0)
        while file.read(2**20):
            pass
        read = time.perf_counter() - started
    return _PROBE_MB * 2**20 / 1e6 / written, _PROBE_MB * 2**20 / 1e6 / read


def _lock_problem(folder: Path) -> str | None:
    """Return why files in a folder can't be locked, None if they can."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return f"flock: {error.strerror}"
    return None


def clock(folder: Path) -> Iterator[Finding]:
    """Compare this node's clock with that of the disk that the nodes share."""
    with tempfile.NamedTemporaryFile(dir=existing(folder)) as file:
        file.write(b"x")
        file.flush()
        skew = time.time() - os.fstat(file.fileno()).st_mtime
    if abs(skew) > _CLOCK_SKEW_S:
        remedy = "set the clock (chronyc): training does not mind, logs and certificates do"
        yield Finding("clock", f"{skew:+.0f} s from the disk's", "note", remedy)
    else:
        yield Finding("clock", f"{skew:+.1f} s from the disk's")


def bandwidth() -> Iterator[Finding]:
    """Copy inside of the host, and from the host to each GPU: one in a bad slot stands out."""
    import torch

    block = torch.ones(_COPY_MB * 2**18)
    target = torch.empty_like(block)
    host = max(_copy_speed(lambda: target.copy_(block)) for _ in range(_COPIES))
    slow = host < _SLOW_HOST_GB_S
    remedy = "other jobs use the node, or its memory is throttled" if slow else ""
    yield Finding("memory bandwidth", f"{host:.1f} GB/s copied", "note" if slow else "ok", remedy)
    speeds: list[float] = []
    for index in range(torch.cuda.device_count()):
        on_gpu, pinned = torch.empty_like(block, device=f"cuda:{index}"), block.pin_memory()

        def copy(on_gpu: torch.Tensor = on_gpu, pinned: torch.Tensor = pinned) -> None:
            on_gpu.copy_(pinned)
            torch.cuda.synchronize(on_gpu.device)

        copy()
        speeds.append(max(_copy_speed(copy) for _ in range(_COPIES)))
    for index, speed in enumerate(speeds):
        slow = speed < _SLOW_GPU_SHARE * max(speeds)
        remedy = "leave the node out: all ranks would wait for this GPU" if slow else ""
        text = f"{speed:.1f} GB/s from the host"
        yield Finding(f"GPU {index} bandwidth", text, "broken" if slow else "ok", remedy)


def _copy_speed(copy: Callable[[], object]) -> float:
    started = time.perf_counter()
    copy()
    return _COPY_MB * 2**20 / 1e9 / (time.perf_counter() - started)
