"""The scripts of Slurm jobs: what they ask for, and what is refused before one is written."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dist_ft import cli
from dist_ft.launcher.slurm import JOB, SlurmJob
from dist_ft.train.checkpoint_names import checkpoint_name
from tests.helpers.tiny_run import write_recipe


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
        (["--time", "5"], "--time must be at least 6 minutes, got '5'"),
        (["--time", "0:05:59"], "--time must be at least 6 minutes, got '0:05:59'"),
        (["--time", "30", "--sbatch=--time=4"], "--time must be at least 6 minutes, got '4'"),
        (["--time", "30", "--sbatch=--signal=B:USR1@1800"], "must be at least 33 minutes"),
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


@pytest.mark.parametrize(
    ("limit", "options"),
    [
        ("6", []),
        ("6:00", []),
        ("0-0:06", []),
        ("1-0", []),
        ("0", []),  # no limit
        ("4", ["--signal=B:USR1@60"]),
        ("4", ["--time=2:00:00"]),
        ("4", ["--time UNLIMITED"]),
    ],
)
def test_a_limit_that_leaves_time_to_train_is_taken(limit: str, options: list[str]) -> None:
    assert f"#SBATCH --time={limit}" in SlurmJob("a", time=limit, options=options).script(["r"])


# In the places of Slurm's commands and of the interpreter: they write down what they are asked.
STAND_INS = {
    "scontrol": """eval "${SCONTROL:-}"
case "$*" in
  "show hostnames"*) echo node1 ;;
  *"show job"*)
    echo "JobId=7 JobState=${STATE:-RUNNING} Reason=${REASON:-None}" \\
      "ExcNodeList=${EXCLUDED:-(null)} Restarts=0"
    ;;
esac""",
    "scancel": 'kill -USR1 "$(cat step)"',
    # As srun does, it refuses an argument of --label.
    "srun": """[[ "$*" != *--label=* ]] || exit 255
eval "${SRUN:-}"; trap "exit 75" USR1; echo $$ >step; while sleep 0.05; do :; done""",
    "python": 'exit "${START_CODE:-0}"',
}


def run_job(
    folder: Path, *, stop_after_s: float | None = None, **variables: str
) -> tuple[int, str]:
    """Run a job's script with stand-ins for all that it calls; return exit code and output."""
    for name, text in STAND_INS.items():
        (folder / name).write_text(f'#!/bin/bash\necho "{name} $*" >>calls\n{text}\n')
        (folder / name).chmod(0o755)
    job = subprocess.Popen(
        ["bash", str(JOB), "recipe.yaml"],
        cwd=folder,
        env={
            "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": "python", "LISTEN_S": "0",
            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1",
            **variables,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    if stop_after_s is not None:
        deadline = time.monotonic() + 10
        while not (folder / "step").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(stop_after_s)
        job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=20)
    return job.returncode, out


def calls(folder: Path) -> str:
    return (folder / "calls").read_text()


@pytest.mark.parametrize(
    ("state", "reason", "requeued"),
    [
        ("RUNNING", "None", True),
        ("COMPLETING", "TimeLimit", True),
        ("COMPLETING", "None", False),  # scancel; or Slurm has requeued it
        ("CANCELLED", "None", False),
    ],
)
def test_a_job_that_was_asked_to_stop_is_requeued_unless_it_was_cancelled(
    state: str, reason: str, requeued: bool, tmp_path: Path
) -> None:
    code, out = run_job(tmp_path, stop_after_s=0.1, STATE=state, REASON=reason)
    assert ("scontrol requeue 7" in calls(tmp_path)) is requeued, out
    assert code == (0 if requeued else 75)
    assert ("saved; requeued" if requeued else "saved; left to Slurm") in out


def test_a_job_that_was_requeued_often_enough_is_not_requeued_again(tmp_path: Path) -> None:
    code, out = run_job(tmp_path, stop_after_s=0.1, MAX_REQUEUES="2", SLURM_RESTART_COUNT="2")
    assert code == 75
    assert "saved, but not requeued any more: submit the same script to go on" in out
    assert "scontrol requeue" not in calls(tmp_path)


def test_a_job_whose_ranks_fail_fails(tmp_path: Path) -> None:
    code, _ = run_job(tmp_path, SRUN="exit 1")
    assert code == 1
    assert "scontrol requeue" not in calls(tmp_path)


def test_a_job_asks_nobody_to_stop_who_does_not_listen_yet(tmp_path: Path) -> None:
    began = time.monotonic()
    code, _ = run_job(tmp_path, stop_after_s=0.0, LISTEN_S="3")
    assert code == 0
    # Whole seconds are counted.
    assert time.monotonic() - began > 2


def test_a_job_that_ends_while_it_is_asked_to_stop_keeps_its_end(tmp_path: Path) -> None:
    ends = "echo $$ >step; sleep 0.3; exit 2"
    code, out = run_job(tmp_path, stop_after_s=0.0, LISTEN_S="1", SRUN=ends)
    assert code == 2
    assert "bad recipe" in out
    assert "scontrol requeue" not in calls(tmp_path)


def test_of_an_array_only_the_own_task_is_asked_to_stop(tmp_path: Path) -> None:
    code, out = run_job(tmp_path, stop_after_s=0.1, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")
    assert code == 0, out
    assert "scancel --quiet --signal=USR1 7_2\n" in calls(tmp_path)


def test_a_job_with_many_tasks_has_one_launcher_on_each_node(tmp_path: Path) -> None:
    look = 'echo "cores $SRUN_CPUS_PER_TASK" >>calls; exit 0'
    code, _ = run_job(
        tmp_path, CHECK_NODES="1", SRUN=look, SLURM_JOB_NUM_NODES="3", SLURM_NTASKS_PER_NODE="8",
        SLURM_CPUS_PER_TASK="2",
    )  # fmt: skip
    assert code == 0
    # To look at the nodes, and to train.
    assert calls(tmp_path).count("srun --nodes=3 --ntasks=3 --ntasks-per-node=1 ") == 2
    assert calls(tmp_path).count("cores 16\n") == 2


def test_a_controller_that_does_not_answer_is_not_taken_for_a_cancelled_job(
    tmp_path: Path,
) -> None:
    (tmp_path / "sleep").write_text('#!/bin/bash\n[[ $1 != 0.* ]] || exec /bin/sleep "$1"\n')
    (tmp_path / "sleep").chmod(0o755)
    silent = '[[ "$*" != *"show job"* ]] || exit 1'
    code, out = run_job(tmp_path, SRUN="exit 75", SCONTROL=silent)
    assert code == 75
    assert "left to Slurm" not in out
    assert "not requeued: type 'scontrol requeue 7' when Slurm answers again" in out
    assert calls(tmp_path).count("show job") > 6


def test_a_controller_that_refuses_to_requeue_is_told(tmp_path: Path) -> None:
    (tmp_path / "sleep").write_text('#!/bin/bash\n[[ $1 != 0.* ]] || exec /bin/sleep "$1"\n')
    (tmp_path / "sleep").chmod(0o755)
    code, out = run_job(tmp_path, SRUN="exit 75", SCONTROL='[[ "$*" != requeue* ]] || exit 1')
    assert code == 75
    assert "saved, but Slurm refused to requeue it: submit the same script" in out


BROKEN = "echo node2; echo node3; exit 0"


@pytest.mark.parametrize(
    ("before", "excluded"), [("(null)", "node2,node3"), ("node[7-9]", "node[7-9],node2,node3")]
)
def test_broken_nodes_are_left_out_beside_those_that_were_before(
    before: str, excluded: str, tmp_path: Path
) -> None:
    code, out = run_job(tmp_path, CHECK_NODES="1", SRUN=BROKEN, EXCLUDED=before)
    assert code == 0
    assert f"broken nodes: node2,node3; requeued without {excluded}\n" in out
    asked = [line for line in calls(tmp_path).splitlines() if line.startswith("scontrol")][-3:]
    assert asked == [
        "scontrol requeuehold 7",
        f"scontrol update JobId=7 ExcNodeList={excluded}",
        "scontrol release 7",
    ]
    assert "slurm-start" not in calls(tmp_path)


def test_nodes_that_slurm_does_not_leave_out_are_not_said_to_be(tmp_path: Path) -> None:
    refuses = '[[ "$*" != update* ]] || exit 1'
    code, out = run_job(tmp_path, CHECK_NODES="1", SRUN=BROKEN, SCONTROL=refuses)
    assert code == 0
    assert "requeued without" not in out
    assert "Slurm did not leave them out: 'scontrol update JobId=7 ExcNodeList=node2,node3'" in out
    assert calls(tmp_path).endswith("scontrol release 7\n")


@pytest.mark.parametrize(
    ("ends", "expected", "said"),
    [
        ("exit 255", 1, "could not be looked at, srun ended with 255"),
        ("exit 143", 0, "asked to stop before it began; requeued"),
    ],
)
def test_nodes_that_could_not_be_looked_at_are_not_taken_for_sound(
    ends: str, expected: int, said: str, tmp_path: Path
) -> None:
    code, out = run_job(tmp_path, CHECK_NODES="1", SRUN=ends)
    assert code == expected
    assert said in out
    assert "slurm-start" not in calls(tmp_path)


def test_a_job_whose_ranks_did_not_all_save_is_requeued(tmp_path: Path) -> None:
    # Pre-empted by the step alone: this script was not signalled.
    code, out = run_job(tmp_path, SRUN="exit 143")
    assert code == 0, out
    assert "asked to stop, and not all was saved; requeued" in out
    assert "scontrol requeue 7" in calls(tmp_path)


def test_sound_nodes_train(tmp_path: Path) -> None:
    code, out = run_job(tmp_path, CHECK_NODES="1", SRUN="exit 0")
    assert code == 0, out
    assert "launch" in calls(tmp_path)


def test_a_job_that_comes_no_further_starts_nothing(tmp_path: Path) -> None:
    code, out = run_job(tmp_path, START_CODE="1", SLURM_RESTART_COUNT="3")
    assert code == 1
    assert "not started" in out
    assert "--job 7 --max-idle 3 recipe.yaml" in calls(tmp_path)
    assert "srun" not in calls(tmp_path)
    assert "requeue" not in calls(tmp_path)


def test_requeues_without_progress_are_counted_until_a_step_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs/tiny"
    recipe = write_recipe(tmp_path)

    def start(job: str = "7") -> int:
        return cli.main(["slurm-start", "--job", job, "--max-idle", "2", str(recipe)])

    def save(step: int) -> None:
        folder = run / "checkpoints" / checkpoint_name(step)
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()

    assert [start(), start()] == [0, 0]
    save(5)
    (run / "checkpoints" / checkpoint_name(9)).mkdir()  # not finished
    assert [start(), start()] == [0, 0]
    save(6)
    assert [start(), start(), start()] == [0, 0, 1]
    error = capsys.readouterr().err
    assert "job 7 was requeued 2 times in a row without a step of progress" in error
    assert "is of step 6" in error
    # Submitted again, it counts anew; so it does if the note is damaged.
    assert [start("8"), start("8")] == [0, 0]
    (run / "logs/job-starts.json").write_text('{"job": "8"')
    assert [start("8"), start("8")] == [0, 0]
    assert cli.main(["slurm-start", "--job", "8", "--max-idle", "2", str(recipe), "sed=1"]) == 2


def test_without_sbatch_the_script_is_there_and_the_reason_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    output = tmp_path / "job.sbatch"
    assert cli.main(["slurm", "quickstart", "--submit", "--output", str(output)]) == 1
    assert "no sbatch on this machine" in capsys.readouterr().err
    assert output.exists()
