"""What the rules on known bad combinations look at."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path

from dist_ft.doctor.deepspeed_ops import stale_locks
from dist_ft.doctor.places import file_system

# Nothing that DeepSpeed compiles takes as long.
_STALE_S = 3600.0
_TOOL_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Situation:
    """Software, hardware and settings of this process, as far as a rule asks for them.

    Attributes:
        environment: Environment variables.
        gpus: Names of the GPUs that torch sees.
        driver: Version of NVIDIA's driver, empty without.
        cuda: CUDA version that torch is built for.
        toolkit: Version of nvcc, empty without.
        kernel: Release of the Linux kernel.
        shm_bytes: Size of /dev/shm.
        memlock_bytes: How much memory may be locked; None is unlimited.
        open_files: How many files the process may open.
        infiniband: Whether there is an InfiniBand device.
        interfaces: Names of the network interfaces.
        file_systems: Type of file system by what is kept there ("triton": compiled kernels).
        stale_locks: Locks of compilations that were killed.
        packages: Names of the installed packages.
        flash_attention_error: Why flash_attn, which is installed, can't be imported.
    """

    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    gpus: tuple[str, ...] = ()
    driver: str = ""
    cuda: str = ""
    toolkit: str = ""
    kernel: str = ""
    shm_bytes: int = 2**40
    memlock_bytes: int | None = None
    open_files: int = 2**20
    infiniband: bool = False
    interfaces: frozenset[str] = frozenset()
    file_systems: Mapping[str, str] = field(default_factory=dict[str, str])
    stale_locks: tuple[Path, ...] = ()
    packages: frozenset[str] = frozenset()
    flash_attention_error: str = ""


def version_of(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, such as (5, 15, 0) of "5.15.0-91-generic"."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match.group().split("."))) if match else ()


def look_around() -> Situation:
    """Return what is the case here."""
    import psutil
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Situation(
        environment=dict(os.environ),
        gpus=tuple(torch.cuda.get_device_name(i) for i in range(count)),
        driver=_said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        cuda=torch.version.cuda or "",
        toolkit=_nvcc(),
        kernel=platform.release() if platform.system() == "Linux" else "",
        shm_bytes=_size_of(Path("/dev/shm")),
        memlock_bytes=None if soft == resource.RLIM_INFINITY else soft,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        infiniband=any(Path("/sys/class/infiniband").glob("*")),
        interfaces=frozenset(psutil.net_if_addrs()),
        file_systems={"triton": file_system(_triton_cache())[0]},
        stale_locks=tuple(stale_locks(older_than_s=_STALE_S, now_s=time.time())),
        packages=frozenset(name.lower() for d in distributions() if (name := d.name)),
        flash_attention_error=_flash_attention_error() if count else "",
    )


def _triton_cache() -> Path:
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton")


def _size_of(folder: Path) -> int:
    return shutil.disk_usage(folder).total if folder.is_dir() else 2**40


def _said(*command: str) -> str:
    """Return the first line that a tool prints, empty if there is no such tool."""
    return _printed(*command).partition("\n")[0].strip()


def _printed(*command: str) -> str:
    """Return what a tool prints, empty if there is none, it fails or does not end."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_TOOL_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _nvcc() -> str:
    match = re.search(r"release (\d+\.\d+)", _printed("nvcc", "--version"))
    return match.group(1) if match else ""


def _flash_attention_error() -> str:
    if importlib.util.find_spec("flash_attn") is None:
        return ""
    try:
        importlib.import_module("flash_attn")
    except (ImportError, OSError) as error:
        return " ".join(str(error).split())[:120]
    return ""
