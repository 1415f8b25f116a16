"""Real Slurm jobs: pre-empted, out of time, cancelled, and with a node that loses power.

One cluster and one course of events for all tests: while one job waits for Slurm, another trains.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_ft.launcher.slurm import JOB
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

    def __init__(
        self, cluster: Cluster, folder: Path, *options: str, sbatch: tuple[str, ...] = (),
        **environment: str,
    ) -> None:  # fmt: skip
        """Write the script with `options` and submit it, with `sbatch` on sbatch's own line."""
        words = (sys.executable, "-m", "dist_ft", "slurm", "recipe.yaml", "--cpus-per-node", "2")
        assert cluster(*words, *options, cwd=folder) == "wrote tiny.sbatch\n"
        settings = (f"{name}={value}" for name, value in environment.items())
        self.cluster = cluster
        self.number = cluster(
            "env", "NPROC=1", *settings, "sbatch", "--parsable", "-p", "main", *sbatch,
            "tiny.sbatch", cwd=folder,
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

    def wait_until_it_says(self, text: str) -> None:
        """Wait until its log has a text."""
        wait_for(lambda: text in self.said, seconds=120, log=self.log)

    def wait_for_the_end(self) -> str:
        """Return the state that it ends in."""
        going = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
        wait_for(lambda: self.cluster.state(self.number) not in going, seconds=180, log=self.log)
        return self.cluster.state(self.number)


class Course:
    """What has become of three jobs: a slow one, one on two nodes, and one with a bad recipe."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        """Let everything happen."""
        self._cluster = cluster
        self.slow = self._submit_slow(folder / "slow")
        self.two_nodes = self._submit_two_nodes(folder / "two")
        self._preempt()
        self.two_nodes.wait_until_it_trains(attempt=1)
        cluster.verb("fail", "node2")
        # Slurm takes a while to notice.
        self.bad = self._submit_bad(folder / "bad")
        supervise(folder / "two/recipe.yaml", ["name=oracle"])
        self.bad_end = self.bad.wait_for_the_end()
        self._let_the_time_pass()
        self._cancel()
        self.two_nodes_end = self.two_nodes.wait_for_the_end()
        # Nothing has brought it back meanwhile.
        self.slow_end = cluster.state(self.slow.number)

    def _submit_slow(self, folder: Path) -> Job:
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
        # Slurm looks at the clock twice a minute: the signal comes 30 to 60 s after the start.
        short = ("--time=2", "--signal=B:USR1@60", "--nodelist=node3")
        return Job(self._cluster, folder, "--time", "30", sbatch=short, PYTHON=str(python))

    def _submit_two_nodes(self, folder: Path) -> Job:
        write_recipe(
            folder,
            train={"max_duration": "300step"},
            evaluation={"every": None},
            checkpoint={"every": "100step"},
            logging={"every": 5},
        )
        return Job(self._cluster, folder, "--nodes", "2")

    def _preempt(self) -> None:
        """Let a more urgent job need a node: Slurm asks ours to leave."""
        self.two_nodes.wait_until_it_trains(attempt=0)
        self._cluster(
            "sbatch", "-p", "urgent", "--nodelist=node2", "--exclusive", "-o", "/dev/null",
            "--wrap", "sleep 1",
        )  # fmt: skip
        self.two_nodes.wait_until_it_says("attempt 0: saved; requeued")

    def _let_the_time_pass(self) -> None:
        self.slow.wait_until_it_says("attempt 0: saved; requeued")
        # The next attempt gets time enough: it would be asked to stop at once.
        self._cluster("scontrol", "update", f"JobId={self.slow.number}", "TimeLimit=60")

    def _cancel(self) -> None:
        self.slow.wait_until_it_trains(attempt=1)
        self._cluster("scancel", self.slow.number)
        wait_for(lambda: len(self.slow.of("stop")) > 1, seconds=20, log=self.slow.log)

    def _submit_bad(self, folder: Path) -> Job:
        recipe = write_recipe(folder)
        sound = recipe.read_text()
        job = Job(self._cluster, folder, sbatch=("--hold",))
        recipe.write_text(sound.replace("seed: 3", "sed: 3"))
        self._cluster("scontrol", "release", job.number)
        return job


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    with running_cluster(tmp_path_factory.mktemp("cluster"), slurm=True, nodes=3) as cluster:
        yield Course(cluster, tmp_path_factory.mktemp("jobs"))


def test_a_two_node_job_is_pre_empted_loses_a_node_and_ends_as_if_nothing_had_been(
    course: Course,
) -> None:
    job = course.two_nodes
    assert course.two_nodes_end == "COMPLETED", job.said
    assert f"job {job.number} attempt 0: saved; requeued" in job.said
    assert f"job {job.number} attempt 2: done" in job.said
    assert "DUE TO NODE FAILURE" in job.said
    kinds = [e["event"] for e in job.of("stop", "resume", "end")]
    assert kinds == ["resume", "stop", "resume", "resume", "end"]
    (stopped,) = job.of("stop")
    _, again, last = job.of("resume")
    assert 0 < stopped["step"] == again["step"] < 300  # no step was lost
    # Nobody could save when the power was lost.
    assert last["step"] in (stopped["step"], 100, 200)
    assert fingerprint(job.run) == fingerprint(job.run.with_name("oracle"))


def test_a_job_whose_time_is_up_saves_and_requeues_itself(course: Course) -> None:
    first, second = course.slow.of("resume")
    assert (first["step"], second["step"]) == (0, course.slow.of("stop")[0]["step"])
    assert second["step"] > 0


def test_a_cancelled_job_saves_and_stays_cancelled(course: Course) -> None:
    assert course.slow_end == "CANCELLED", course.slow.said
    assert "attempt 1: saved; left to Slurm" in course.slow.said
    _, last = course.slow.of("stop")
    assert newest_checkpoint(course.slow.run).name == f"step-{last['step']:08d}"
    assert last["step"] > course.slow.of("resume")[1]["step"]


def test_a_bad_recipe_fails_the_job_without_requeueing_it(course: Course) -> None:
    assert course.bad_end == "FAILED"
    assert "error: sed: unknown key" in course.bad.said
    assert "requeued" not in course.bad.said


# In the interpreter's place: node1 is broken, and a launcher says where it is.
NODES = """\
#!/bin/bash
case "$*" in
  *doctor*) [ "$SLURMD_NODENAME" != node1 ] ;;
  *" launch "*) echo "launched on $SLURMD_NODENAME with $SLURM_CPUS_ON_NODE" ;;
esac
"""
# A launcher that trains until it is asked to stop.
TASKS = """\
#!/usr/bin/env python3
import os, signal, sys, time
def say(what):
    print("task", os.environ["SLURM_ARRAY_TASK_ID"], what, flush=True)
def stop(number, frame):
    say("was asked")
    sys.exit(75)
if "launch" in sys.argv:
    signal.signal(signal.SIGUSR1, stop)
    say("trains")
    time.sleep(60)
"""


@pytest.fixture
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("idle"), slurm=True, nodes=3) as cluster:
        yield cluster


def _submit(cluster: Cluster, folder: Path, python: str, *options: str, **more: str) -> str:
    (folder / "python").write_text(python)
    (folder / "python").chmod(0o755)
    settings = {"PYTHON": str(folder / "python"), "LISTEN_S": "1", **more}
    return cluster(
        "env", *(f"{name}={value}" for name, value in settings.items()),
        "sbatch", "--parsable", "--requeue", "--open-mode=append", "--output=%j-%a.log", *options,
        str(JOB), "recipe.yaml", cwd=folder,
    ).strip()  # fmt: skip


def test_a_broken_node_is_left_out_with_those_that_were_before(
    idle: Cluster, tmp_path: Path
) -> None:
    options = ("--ntasks-per-node=3", "--cpus-per-task=2", "--exclude=node3", "--array=4")
    number = _submit(idle, tmp_path, NODES, *options, CHECK_NODES="1")
    log = tmp_path / f"{number}-4.log"
    wait_for(lambda: log.exists() and "attempt 1: done" in log.read_text(), seconds=60, log=log)
    said = log.read_text()
    assert "broken nodes: node1; requeued without node3,node1\n" in said
    # One launcher, which has the cores of three tasks.
    assert [line for line in said.splitlines() if "launched" in line] == [
        "launched on node2 with 6"
    ]


def test_of_an_array_only_the_task_that_is_asked_stops(idle: Cluster, tmp_path: Path) -> None:
    number = _submit(idle, tmp_path, TASKS, "--array=0-1", "--cpus-per-task=2", MAX_REQUEUES="0")
    wait_for(lambda: len([*tmp_path.glob("*.log")]) == 2, seconds=60)
    by_task = {path.stem[-1]: path for path in tmp_path.glob("*.log")}
    for log in by_task.values():
        wait_for(lambda log=log: "trains" in log.read_text(), seconds=60, log=log)
    # Which of them bears the number of the array.
    text = idle("scontrol", "-o", "show", "job", number)
    (last,) = [
        line.partition("ArrayTaskId=")[2].split()[0]
        for line in text.splitlines()
        if line.startswith(f"JobId={number} ")
    ]
    idle("scancel", "--batch", "--signal=USR1", f"{number}_{last}")
    log = by_task.pop(last)
    wait_for(lambda: "not requeued any more" in log.read_text(), seconds=60, log=log)
    assert f"task {last} was asked" in log.read_text()
    (other,) = by_task.values()
    assert "was asked" not in other.read_text()
    idle("scancel", number)
