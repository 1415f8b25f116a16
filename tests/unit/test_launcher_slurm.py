"""The scripts of Slurm jobs: what they ask for, and what is refused before one is written."""

import re
import subprocess
from pathlib import Path

import pytest

from dist_ft import cli
from dist_ft.launcher.slurm import SlurmJob


def run_script(script: str, folder: Path, **variables: str) -> str:
    """Return the words that the job would train, with `bash job.sh` replaced by an echo."""
    text = re.sub(r"^exec bash \S+", "printf '%s\\\\n'", script, flags=re.MULTILINE)
    done = subprocess.run(
        ["bash", "-u", "-c", text], env=variables, cwd=folder, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return done.stdout


def test_a_job_of_several_nodes(tmp_path: Path) -> None:
    job = SlurmJob("tickets", nodes=4, gpus_per_node=8, time="8:00:00", options=["--account=a"])
    script = job.script(["my recipe.yaml", "optim.lr=1e-4"], python="python3")
    asked = [line.partition(" ")[2] for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {
        "--job-name=tickets", "--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8",
        "--time=8:00:00", "--requeue", "--open-mode=append", "--signal=B:USR1@180", "--account=a",
    } <= set(asked)  # fmt: skip
    assert run_script(script, tmp_path) == "my recipe.yaml\noptim.lr=1e-4\n"


def test_each_task_of_an_array_has_its_own_overrides(tmp_path: Path) -> None:
    job = SlurmJob("sweep", each=["seed=0 name=a", "seed=1 name='b'"])
    script = job.script(["r.yaml"])
    assert "#SBATCH --array=0-1" in script
    assert run_script(script, tmp_path, SLURM_ARRAY_TASK_ID="1") == "r.yaml\nseed=1\nname=b\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "0"], "--nodes must be at least 1, got 0"),
        (["--time", "soon"], "--time must be like 30 (minutes), 8:00:00"),
        (["--sbatch", "partition=a"], "--sbatch takes an option of sbatch"),
        (["--each", "seed=1"], "has no name of its own"),
        (["--each", "sed=1 name=a"], "sed: unknown key"),
    ],
)
def test_what_sbatch_would_choke_on_is_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "job.sbatch"
    assert cli.main(["slurm", "quickstart", *words, "--output", str(output)]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_without_sbatch_the_script_is_there_and_the_reason_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    output = tmp_path / "job.sbatch"
    assert cli.main(["slurm", "quickstart", "--submit", "--output", str(output)]) == 1
    assert "no sbatch on this machine" in capsys.readouterr().err
    assert output.exists()
