"""The examinations: which probes a machine, a node of a cluster and a rank go through."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dist_ft.doctor.deepspeed_ops import deepspeed_ops
from dist_ft.doctor.findings import Finding, run_probes
from dist_ft.doctor.known import known_problems
from dist_ft.doctor.machine import backends, bandwidth, clock, devices, disks, memory, network
from dist_ft.doctor.ranks import between_ranks
from dist_ft.doctor.situation import look_around
from dist_ft.doctor.software import (
    deepspeed_accelerator,
    environment,
    kernels,
    packaged_data,
    versions,
)

if TYPE_CHECKING:
    from dist_ft.config import Recipe


def examine(folders: Mapping[str, Path] | None = None) -> list[Finding]:
    """Return what was found, broken things included; takes some seconds.

    Args:
        folders: Where a run writes and reads, by what each is for; the current folder by default.
    """
    places = folders or {"run": Path.cwd()}
    return run_probes(
        {
            "versions": versions,
            "devices": devices,
            # Forks, so it comes before anything that starts threads.
            "between ranks": between_ranks,
            "backends": backends,
            "deepspeed": deepspeed_accelerator,
            "deepspeed ops": deepspeed_ops,
            "kernels": kernels,
            "network": network,
            "memory": memory,
            "disk": lambda: disks(places),
            "environment": environment,
            "known": lambda: known_problems(look_around()),
            "packaged data": packaged_data,
        }
    )


def examine_node(folders: Mapping[str, Path] | None = None) -> list[Finding]:
    """Return what may be wrong with one node of a cluster.

    Devices, network, memory, disk, clock, bandwidth and known bad combinations.

    Args:
        folders: As of `examine`.
    """
    places = folders or {"run": Path.cwd()}
    return run_probes(
        {
            "devices": devices,
            "backends": backends,
            "network": network,
            "memory": memory,
            "disk": lambda: disks(places),
            "clock": lambda: clock(next(iter(places.values()))),
            "bandwidth": bandwidth,
            "known": lambda: known_problems(look_around()),
        }
    )


def examine_rank() -> list[Finding]:
    """Return what a rank beside rank 0 finds: only what differs from rank to rank."""
    return run_probes(
        {
            "devices": devices,
            "between ranks": between_ranks,
            "backends": backends,
        }
    )


def folders_of(recipe: Recipe) -> dict[str, Path]:
    """Return the folders that a recipe's run uses, by what each is for."""
    folders = {"run": recipe.output_dir / recipe.name, "data": recipe.data_dir}
    if recipe.cache.policy != "off" and recipe.cache.dir is not None:
        folders["cache"] = recipe.cache.dir
    return folders
