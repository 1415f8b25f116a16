"""A throw-away cluster of network namespaces, with Slurm or bare."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.forked import in_a_fork

ROOT = Path(__file__).parents[2]
_CLONE_NEWNET = 0x40000000
CLUSTER = ROOT / "tests/slurm/cluster.sh"


def why_not(*, slurm: bool) -> str | None:
    """Return why no cluster can be started here, or None."""
    needed = ["ip", "nsenter", "unshare", *(["slurmctld", "slurmd", "munged"] if slurm else [])]
    missing = [tool for tool in needed if not shutil.which(tool)]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurm-wlm munge iproute2"
    if os.geteuid() != 0:
        return "a cluster of network namespaces needs root"
    allowed = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "true"], check=False, capture_output=True
    )
    return "namespaces are not allowed here" if allowed.returncode else None


def in_own_network(action: Callable[[], None]) -> None:
    """Run `action` in a fork with a network of its own, which has the loopback device only."""

    def apart() -> None:
        assert ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) == 0
        set_loopback("up")
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        action()

    in_a_fork(apart)


def set_loopback(state: str) -> None:
    """Pull the cable of this network ("down") or put it back ("up")."""
    subprocess.run(["ip", "link", "set", "lo", state], check=True)


class Cluster:
    """A running cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *words: str, cwd: Path | None = None, check: bool = True) -> str:
        """Run a command on the controller and return its output."""
        done = subprocess.run(
            ["bash", str(CLUSTER), "exec", str(self.folder), *words],
            cwd=cwd or self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done.stdout

    def verb(self, verb: str, *words: str) -> None:
        """Do something to the cluster, as its script names it."""
        subprocess.run(
            ["bash", str(CLUSTER), verb, str(self.folder), *words], check=True, timeout=30
        )

    def start_on(self, node: str, *words: str, cwd: Path, log: Path) -> subprocess.Popen[bytes]:
        """Start a command on a node."""
        with log.open("wb") as file:
            return subprocess.Popen(
                ["bash", str(CLUSTER), "on", str(self.folder), node, *words],
                cwd=cwd,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=file,
            )

    def state(self, job: str) -> str:
        """Return the state of a job, such as RUNNING."""
        text = self("scontrol", "-o", "show", "job", job)
        return text.partition("JobState=")[2].split()[0]


@contextmanager
def running_cluster(
    folder: Path, *, slurm: bool, nodes: int = 2, most_s: int = 600
) -> Iterator[Cluster]:
    """Start some nodes, and end everything on them afterwards, or after `most_s` seconds."""
    environment = {**os.environ, "BARE": "0" if slurm else "1", "MAX_S": str(most_s)}
    subprocess.run(
        ["bash", str(CLUSTER), "up", folder, str(nodes)], check=True, timeout=60, env=environment
    )
    try:
        yield Cluster(folder)
    finally:
        subprocess.run(["bash", str(CLUSTER), "down", str(folder)], check=True, timeout=30)


def wait_for(condition: Callable[[], bool], *, seconds: float, log: Path | None = None) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        shown = log.read_text() if log is not None and log.exists() else ""
        assert time.monotonic() < deadline, shown
        time.sleep(0.2)
