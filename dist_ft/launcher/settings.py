"""How many ranks a node gets, how they meet, and the thread settings that they need."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import socket
import subprocess
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

HIGHEST_PORT = 65535


@dataclass(frozen=True)
class Place:
    """This node among the nodes of a run.

    Attributes:
        nodes: How many nodes the run has.
        node_rank: Which one this is, from 0.
        head_node: Name of node 0.
        port: A free port of node 0; 0 lets a run of one node find one for every attempt.
    """

    nodes: int = 1
    node_rank: int = 0
    head_node: str = "127.0.0.1"
    port: int = 0


@dataclass(frozen=True)
class LaunchSettings:
    """How a run is started and watched.

    Attributes:
        ranks: Ranks on this node.
        place: This node among the nodes.
        max_restarts: How often ranks that have failed are started again.
        grace_s: Seconds that ranks get to save after they were asked to stop.
    """

    ranks: int
    place: Place = Place()
    max_restarts: int = 3
    grace_s: float = 120.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: Naming the setting.
        """
        place = self.place
        for name, value, least in (
            ("NPROC", self.ranks, 1),
            ("NNODES", place.nodes, 1),
            ("NODE_RANK", place.node_rank, 0),
            ("MAX_RESTARTS", self.max_restarts, 0),
        ):
            if value < least:
                above = f"above {least - 1}" if least else "from 0 on"
                raise ValueError(f"{name} must be a whole number {above}, got '{value}': change it")
        if place.node_rank >= place.nodes:
            raise ValueError(
                f"NODE_RANK must be below NNODES ({place.nodes}), got {place.node_rank}: nodes "
                "count from 0"
            )
        if place.nodes > 1 and not 0 < place.port <= HIGHEST_PORT:
            raise ValueError(
                f"MASTER_PORT must be a free port of the head node, got {place.port}: several "
                "nodes cannot agree on one by themselves"
            )

    @property
    def world_size(self) -> int:
        """Ranks over all nodes."""
        return self.ranks * self.place.nodes

    def rendezvous(self) -> dict[str, str]:
        """Return where the ranks of one attempt meet; a new place for each attempt.

        The store lives in rank 0 and dies with it. What torch's elastic agent does, one store for
        all attempts, lets a restarted rank read addresses of the attempt before (pytorch #135712).
        """
        place = self.place
        if place.nodes > 1:
            return {"MASTER_ADDR": place.head_node, "MASTER_PORT": str(place.port)}
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(place.port or _free_port())}

    def of_rank(self, local_rank: int) -> dict[str, str]:
        """Return the place of a rank, in torchrun's variables."""
        return {
            "RANK": str(self.place.node_rank * self.ranks + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.ranks),
        }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _names_a_gpu(name: str) -> bool:
    return name.strip().isdecimal() or name.strip().startswith(("GPU-", "MIG-"))


def count_gpus() -> int:
    """Return the GPUs that this process may use, without starting CUDA in it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # As CUDA reads it: up to the first name that is none, such as -1 or NoDevFiles.
        return sum(1 for _ in takewhile(_names_a_gpu, visible.split(",")))
    tool = shutil.which("nvidia-smi")
    if tool is None:  # as in many containers, and with AMD's
        nvidia = [p for p in Path("/dev").glob("nvidia*") if p.name[6:].isdecimal()]
        return len(nvidia) or _count_amd()
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _count_amd() -> int:
    """Return the GPUs among the nodes that AMD's driver lists, if torch is built for them.

    A CPU's node has the id 0.
    """
    if "rocm" not in importlib.metadata.version("torch"):
        return 0
    for name in ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if (visible := os.environ.get(name)) is not None:
            return sum(1 for _ in takewhile(_names_a_gpu, visible.split(",")))
    nodes = Path("/sys/class/kfd/kfd/topology/nodes")
    count = 0
    for file in nodes.glob("*/gpu_id"):
        with contextlib.suppress(OSError):  # of one that this container may not use
            count += file.read_text().strip() not in ("", "0")
    return count


def thread_settings(*, ranks: int, gpus: int) -> dict[str, str]:
    """Return environment variables that ranks need and that are not set yet.

    All ranks' threads together are as many as the cores. DeepSpeed guesses its accelerator by
    installed packages, not by devices.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    wanted = {
        "OMP_NUM_THREADS": str(max(1, (cores or 1) // ranks)),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if gpus == 0:
        wanted["DS_ACCELERATOR"] = "cpu"
    return {name: value for name, value in wanted.items() if name not in os.environ}
