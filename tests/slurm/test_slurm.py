"""Real Slurm jobs: pre-empted, out of time, cancelled, and with a node that loses power."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cluster import Cluster, running_cluster, wait_for, why_not
from tests.helpers.supervised import fingerprint, supervise
from tests.helpers.tiny_run import events, newest_checkpoint, write_recipe

REASON = why_not(slurm=True)
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
SLOW = Path(__file__).with_name("slow.py")


class Job:
    """A job that `dist-ft slurm` has written and that is submitted."""

    def __init__(self, cluster: Cluster, folder: Path, *options: str, **environment: str) -> None:
        """Write the script with `options` and submit it."""
        words = (sys.executable, "-m", "dist_ft", "slurm", "recipe.yaml", "--cpus-per-node", "2")
        assert cluster(*words, *options, cwd=folder) == "wrote tiny.sbatch\n"
        settings = (f"{name}={value}" for name, value in environment.items())
        self.cluster = cluster
        self.number = cluster(
            "env", "NPROC=1", *settings, "sbatch", "--parsable", "-p", "main", "tiny.sbatch",
            cwd=folder,
        ).strip()  # fmt: skip
        self.log = folder / f"tiny-{self.number}.log"
        self.run = folder / "runs/tiny"

    @property
    def said(self) -> str:
        """What it has written so far."""
        return self.log.read_text() if self.log.exists() else ""

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        """Return its run's events of some kinds."""
        if not (self.run / "metrics.jsonl").exists():
            return []
        return [e for e in events(self.run) if e["event"] in kinds]

    def wait_until_it_trains(self, *, attempt: int) -> None:
        """Wait for some steps of an attempt, from 0."""

        def trains() -> bool:
            found = self.of("resume", "step")
            starts = [i for i, e in enumerate(found) if e["event"] == "resume"]
            return len(starts) > attempt and len(found) > starts[attempt] + 2

        wait_for(trains, seconds=120, log=self.log)

    def wait_for_the_end(self) -> str:
        """Return the state that it ends in."""
        going = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
        wait_for(lambda: self.cluster.state(self.number) not in going, seconds=180, log=self.log)
        return self.cluster.state(self.number)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster"), slurm=True, nodes=3) as running:
        yield running


@pytest.fixture(scope="module")
def slow_job(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Return a job whose time is up long before its end; the other test runs meanwhile."""
    folder = tmp_path_factory.mktemp("slow")
    write_recipe(
        folder,
        train={"max_duration": "9000step"},
        evaluation={"every": None},
        checkpoint={"every": "5000step"},
        logging={"every": 5},
    )
    python = folder / "slow.sh"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {SLOW} "$@"\n')
    python.chmod(0o755)
    # Slurm looks at the clock twice a minute: the signal comes 20 to 50 s after the start.
    options = ("--time", "2", "--sbatch=--signal=B:USR1@100", "--sbatch=--nodelist=node3")
    return Job(cluster, folder, *options, PYTHON=str(python))


@pytest.mark.usefixtures("slow_job")  # it waits for its time to pass
def test_a_two_node_job_is_pre_empted_loses_a_node_and_ends_as_if_nothing_had_been(
    cluster: Cluster, tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path,
        train={"max_duration": "300step"},
        evaluation={"every": None},
        checkpoint={"every": "100step"},
        logging={"every": 5},
    )
    supervise(recipe, ["name=oracle"])
    job = Job(cluster, tmp_path, "--nodes", "2")
    job.wait_until_it_trains(attempt=0)
    # A more urgent job needs a node: Slurm asks ours to leave, which saves and requeues itself.
    urgent = cluster(
        "sbatch", "--parsable", "-p", "urgent", "--nodelist=node2", "--exclusive",
        "-o", "/dev/null", "--wrap", "sleep 1",
    ).strip()  # fmt: skip
    wait_for(lambda: cluster.state(urgent) == "COMPLETED", seconds=60, log=job.log)
    job.wait_until_it_trains(attempt=1)
    cluster.verb("fail", "node2")
    assert job.wait_for_the_end() == "COMPLETED", job.said
    assert f"job {job.number} attempt 0: saved; requeued" in job.said
    assert f"job {job.number} attempt 2: done" in job.said
    kinds = [e["event"] for e in job.of("stop", "resume", "end")]
    assert kinds == ["resume", "stop", "resume", "resume", "end"]
    (stopped,) = job.of("stop")
    _, again, last = job.of("resume")
    assert 0 < stopped["step"] == again["step"] < 300  # no step was lost
    # Nobody could save when the power was lost.
    assert last["step"] in (stopped["step"], 100, 200)
    assert fingerprint(job.run) == fingerprint(tmp_path / "runs/oracle")


def test_a_job_whose_time_is_up_saves_and_requeues_and_a_cancelled_one_saves(
    cluster: Cluster, slow_job: Job
) -> None:
    job = slow_job
    wait_for(lambda: "attempt 0: saved; requeued" in job.said, seconds=150, log=job.log)
    wait_for(lambda: len(job.of("resume")) > 1, seconds=60, log=job.log)
    assert 0 < job.of("stop")[0]["step"] == job.of("resume")[1]["step"]
    # Time enough for the next attempt: this one's may be up at once.
    cluster("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")

    def trains() -> bool:
        return [e["event"] for e in job.of("resume", "step", "stop")[-3:]] == ["step"] * 3

    wait_for(trains, seconds=120, log=job.log)
    before = len(job.of("stop"))
    cluster("scancel", job.number)
    assert job.wait_for_the_end() == "CANCELLED"
    wait_for(lambda: len(job.of("stop")) == before + 1, seconds=20, log=job.log)
    last = job.of("stop")[-1]["step"]
    assert newest_checkpoint(job.run).name == f"step-{last:08d}"


def test_a_bad_recipe_fails_the_job_without_requeueing_it(cluster: Cluster, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    cluster(sys.executable, "-m", "dist_ft", "slurm", "recipe.yaml", cwd=tmp_path)
    recipe.write_text(recipe.read_text().replace("seed: 3", "sed: 3"))
    job = cluster("sbatch", "--parsable", "tiny.sbatch", cwd=tmp_path).strip()
    log = tmp_path / f"tiny-{job}.log"
    wait_for(lambda: cluster.state(job) == "FAILED", seconds=60, log=log)
    assert "error: sed: unknown key" in log.read_text()
    assert "requeued" not in log.read_text()
