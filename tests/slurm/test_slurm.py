"""A real two-node Slurm job is pre-empted, requeues itself and comes to the same end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.cluster import Cluster, running_cluster, wait_for, why_not
from tests.helpers.supervised import fingerprint, supervise
from tests.helpers.tiny_run import events, write_recipe

REASON = why_not(slurm=True)
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster"), slurm=True) as running:
        yield running


def test_a_two_node_job_is_pre_empted_requeues_itself_and_ends_as_if_it_had_not_been(
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
    dist_ft = (sys.executable, "-m", "dist_ft")
    written = cluster(
        *dist_ft, "slurm", str(recipe), "--nodes", "2", "--cpus-per-node", "2", cwd=tmp_path
    )
    assert written == "wrote tiny.sbatch\n"
    job = cluster(
        "env", "NPROC=1", "sbatch", "--parsable", "--partition=main", "tiny.sbatch", cwd=tmp_path
    ).strip()
    log = tmp_path / f"tiny-{job}.log"
    run = tmp_path / "runs/tiny"

    def trains() -> bool:
        return (run / "metrics.jsonl").exists() and any(
            e["event"] == "step" and e["step"] >= 5 for e in events(run)
        )

    wait_for(trains, seconds=90, log=log)
    # A more urgent job needs the nodes: Slurm asks ours to leave, which saves and requeues itself.
    urgent = cluster(
        "sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null",
        "--wrap", "sleep 1",
    ).strip()  # fmt: skip
    wait_for(lambda: cluster.state(urgent) == "COMPLETED", seconds=60, log=log)
    wait_for(
        lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), seconds=120, log=log
    )
    said = log.read_text()
    assert cluster.state(job) == "COMPLETED", said
    assert f"job {job} attempt 0: saved; requeued" in said
    assert f"job {job} attempt 1: done" in said
    kinds = [e["event"] for e in events(run) if e["event"] in ("stop", "resume", "end")]
    assert kinds == ["resume", "stop", "resume", "end"]
    stopped = next(e for e in events(run) if e["event"] == "stop")
    resumed = [e for e in events(run) if e["event"] == "resume"][1]
    assert 0 < stopped["step"] == resumed["step"] < 300  # no step was lost
    assert fingerprint(run) == fingerprint(tmp_path / "runs/oracle")


def test_a_bad_recipe_fails_the_job_without_requeueing_it(cluster: Cluster, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    cluster(sys.executable, "-m", "dist_ft", "slurm", str(recipe), cwd=tmp_path)
    recipe.write_text(recipe.read_text().replace("seed: 3", "sed: 3"))
    job = cluster("sbatch", "--parsable", "tiny.sbatch", cwd=tmp_path).strip()
    log = tmp_path / f"tiny-{job}.log"
    wait_for(lambda: cluster.state(job) == "FAILED", seconds=60, log=log)
    assert "error: sed: unknown key" in log.read_text()
    assert "requeued" not in log.read_text()
