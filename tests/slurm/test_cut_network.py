"""The cable between two nodes is pulled: both sides give up in time, and go on when it is back."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.cluster import running_cluster, wait_for, why_not
from tests.helpers.supervised import fingerprint, supervise
from tests.helpers.tiny_run import events, write_recipe

REASON = why_not(slurm=False)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
TIMEOUT_S = 4.0


def test_a_cut_link_is_noticed_on_both_sides_and_the_run_ends_the_same(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        train={"max_duration": "300step"},
        evaluation={"every": None},
        checkpoint={"every": "50step"},
        supervision={"timeout_s": TIMEOUT_S},
    )
    supervise(recipe, ["name=oracle"])
    run = tmp_path / "runs/tiny"
    logs = [tmp_path / f"node{n}.log" for n in (1, 2)]
    launch = (sys.executable, "-m", "dist_ft", "launch", "--nnodes", "2", "--nproc", "1")
    meeting = ("--head-node", "node1", "--port", "23456", "--node-rank")
    with running_cluster(tmp_path / "cluster", slurm=False) as cluster:
        launchers = [
            cluster.start_on(
                f"node{n + 1}", *launch, *meeting, str(n), "train", str(recipe), "--resume",
                cwd=tmp_path, log=logs[n],
            )
            for n in (0, 1)
        ]  # fmt: skip

        def trains() -> bool:
            return (run / "metrics.jsonl").exists() and any(e["step"] >= 20 for e in events(run))

        wait_for(trains, seconds=90, log=logs[0])
        cluster.verb("cut", "node2")
        cut = time.monotonic()
        wait_for(lambda: all("hung for" in log.read_text() for log in logs), seconds=60)
        noticed = time.monotonic() - cut
        cluster.verb("mend", "node2")
        codes = [launcher.wait(timeout=120) for launcher in launchers]
    assert codes == [0, 0], [log.read_text() for log in logs]
    for rank, log in enumerate(logs):
        match = re.search(rf"rank {rank} hung for ([\d.]+) s", log.read_text())
        assert match, log.read_text()
        assert float(match[1]) < 2 * TIMEOUT_S
    # What the launchers said above, and the time it took to read it.
    assert noticed < 3 * TIMEOUT_S
    assert fingerprint(run) == fingerprint(tmp_path / "runs/oracle")
    assert [e["event"] for e in events(run) if e["event"] in ("end", "failure")] == [
        "failure",
        "end",
    ]
