"""What a run was started with: versions, devices and launcher, for ``env.json``."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from dist_ft import dist

VERSIONS = ("torch", "transformers", "deepspeed", "datasets", "pyarrow", "numpy")


def environment(world: dist.World, device: torch.device) -> dict[str, Any]:
    """Return commit, versions, devices and launcher, for ``env.json``."""
    return {
        "dist_ft": importlib.metadata.version("dist-ft"),
        "commit": _commit(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "world_size": world.world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
