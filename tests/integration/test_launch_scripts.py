"""The shell around dist_ft: scripts, pinned versions, README."""

import contextlib
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dist_ft.data.packaged import PACKAGED
from dist_ft.model.sources import PACKAGED_MODELS

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    *sorted((ROOT / "launch").glob("*.sh")),
    *sorted((ROOT / "slurm").iterdir()),
    ROOT / ".ci/run",
    ROOT / "dist_ft/launcher/job.sh",
    ROOT / "tests/slurm/cluster.sh",
]
TORCHRUN = ROOT / "launch" / "torchrun.sh"

# A program in dist_ft's place: it shows what the launcher gave it and ends as it is told.
STAND_IN = """\
import os, signal, sys, time
from pathlib import Path
command, *words = sys.argv[1:]
seen = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, frame: seen.append(number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
names = ("WORLD_SIZE", "OMP_NUM_THREADS", "DS_ACCELERATOR", "LOCAL_RANK")
rank = os.environ["RANK"]
Path(f"environment-{rank}").write_text(" ".join(os.environ.get(n, "-") for n in names))
code, wait = int(words[1]), float(words[2])
ready = time.monotonic()
while not seen and time.monotonic() - ready < wait:
    time.sleep(0.02)
time.sleep(0.5)  # a second request would come now
Path(f"seen-{rank}").write_text(str(len(seen)))
sys.exit(75 if seen else code)
"""
# In the interpreter's place: `-m dist_ft launch ...` starts the stand-in on every rank.
INTERPRETER = """\
#!/bin/sh
shift 3
exec {python} -m dist_ft launch --module stand_in "$@"
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "python").write_text(INTERPRETER.format(python=sys.executable))
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def environment(folder: Path, **changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "DS_ACCELERATOR")}
    python = folder / "python"
    return {
        **kept,
        "PYTHON": str(python if python.exists() else sys.executable),
        "PYTHONPATH": f"{folder}:{ROOT}",
        "CUDA_VISIBLE_DEVICES": "",
        **changes,
    }


def launch(folder: Path, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(TORCHRUN), *words],
        cwd=folder,
        env=environment(folder, **changes),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@contextlib.contextmanager
def launched(
    folder: Path, *words: str, under: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """Start the launcher and wait until both ranks are up; leave nothing behind."""

    def hear_all() -> None:  # even if the tests themselves run in the background
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    process = subprocess.Popen(
        [*under, "bash", str(TORCHRUN), *words],
        cwd=folder,
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=hear_all,  # noqa: PLW1509 - takes no lock
    )
    try:
        deadline = time.monotonic() + 60
        while not all((folder / f"environment-{rank}").exists() for rank in "01"):
            assert time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.05)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_bash_and_executable(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    called_by_name = script.suffix == ".sbatch" or script.name in ("common.sh", "job.sh")
    assert os.access(script, os.X_OK) or called_by_name


def test_ranks_get_threads_accelerator_and_rendezvous_settings(stand_in: Path) -> None:
    done = launch(stand_in, "train", "good", "0", "0", OMP_NUM_THREADS="3")
    assert done.returncode == 0, done.stderr
    for rank in "01":
        assert (stand_in / f"environment-{rank}").read_text() == f"2 3 cpu {rank}"


@pytest.mark.parametrize("code", [1, 2, 75])
def test_the_launcher_ends_with_the_code_of_the_run(stand_in: Path, code: int) -> None:
    assert launch(stand_in, "train", "good", str(code), "0", NPROC="1").returncode == code


def test_the_lines_of_a_bad_recipe_are_shown_once() -> None:
    done = launch(ROOT, "train", "quickstart", "sed=1", "optim.lr=-1", "--resume")
    assert done.returncode == 2
    assert sorted(line.split(":")[:2] for line in done.stderr.splitlines()) == [
        ["error", " optim.lr"],
        ["error", " sed"],
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_each_rank_once(stand_in: Path, number: int) -> None:
    with launched(stand_in, "train", "good", "0", "60") as process:
        process.send_signal(number)
        assert process.wait(timeout=60) == 75
        assert [(stand_in / f"seen-{rank}").read_text() for rank in "01"] == ["1", "1"]


def test_a_launcher_under_nohup_outlives_its_terminal(stand_in: Path) -> None:
    with launched(stand_in, "train", "good", "0", "3", under=("nohup",)) as process:
        os.killpg(process.pid, signal.SIGHUP)
        assert process.wait(timeout=60) == 0
        assert [(stand_in / f"seen-{rank}").read_text() for rank in "01"] == ["0", "0"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"NPROC": "0"}, "NPROC must be a whole number above 0, got '0'"),
        ({"NPROC": "two"}, "NPROC must be a whole number above 0, got 'two'"),
        ({"NNODES": "-1"}, "NNODES must be a whole number above 0, got '-1'"),
        ({"NPROC": "3", "CUDA_VISIBLE_DEVICES": "0,1"}, "NPROC is 3 but there are 2 GPUs"),
    ],
)
def test_bad_settings_end_with_2(stand_in: Path, changes: dict[str, str], message: str) -> None:
    done = launch(stand_in, "train", "good", "0", "0", **changes)
    assert done.returncode == 2
    assert message in done.stderr


def test_the_launcher_explains_itself(tmp_path: Path) -> None:
    done = launch(tmp_path, "--help")
    assert done.returncode == 0
    assert "NPROC" in done.stdout
    assert "set -uo" not in done.stdout
    assert launch(tmp_path).returncode == 2


def common(commands: str, venv: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run shell commands after the shared steps are known, on an environment of their own."""
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source '{ROOT}/launch/common.sh'; {commands}"],
        env={**os.environ, "VENV": str(venv), **changes},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_failing_step_names_itself_its_output_and_the_remedy(tmp_path: Path) -> None:
    command = "step 'install it' 'buy a disk' bash -c 'echo the disk is full; exit 3'; echo on"
    done = common(command, tmp_path / "venv")
    assert done.returncode == 1
    assert done.stdout == "== install it\n"
    assert "FAILED: install it" in done.stderr
    assert "the disk is full" in done.stderr
    assert "Remedy: buy a disk" in done.stderr


def test_a_step_that_works_is_quiet(tmp_path: Path) -> None:
    done = common("step 'install it' 'buy a disk' echo much", tmp_path / "venv")
    assert (done.returncode, done.stdout, done.stderr) == (0, "== install it\n", "")


@pytest.mark.parametrize("name", ["python-that-is-nowhere", "old"])
def test_without_a_new_python_the_remedy_is_said(tmp_path: Path, name: str) -> None:
    if name == "old":
        name = str(tmp_path / "old")
        Path(name).write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2 && exit\nexit 1\n')
        Path(name).chmod(0o755)
    done = common("make_environment base", tmp_path / "venv", PYTHON=name)
    assert done.returncode == 1
    assert "FAILED: find Python" in done.stderr
    assert "install Python 3.11" in done.stderr


def test_install_says_how_to_go_on_and_makes_nothing_twice(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    common(f"_fingerprint >'{venv}/.made-base'", venv)
    done = subprocess.run(
        ["bash", ROOT / "launch" / "install.sh"], env={**os.environ, "VENV": str(venv)},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "is up to date" in done.stdout
    assert f"source {venv}/bin/activate" in done.stdout


@pytest.mark.parametrize(("made", "wanted"), [("base", "base"), ("dev", "base"), ("dev", "dev")])
def test_an_environment_that_is_made_is_not_made_again(
    tmp_path: Path, made: str, wanted: str
) -> None:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    done = common(f"_fingerprint >'{venv}/.made-{made}'; make_environment {wanted}", venv)
    assert done.returncode == 0, done.stderr
    assert "is up to date" in done.stdout


def test_another_set_of_versions_makes_the_environment_again(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / ".made-base").write_text("of another time\n")
    # Where it would begin, it finds no Python.
    done = common("make_environment base", venv, PYTHON="python-that-is-nowhere")
    assert "FAILED: find Python" in done.stderr


def pinned(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().replace("\\\n", " ").splitlines()
    found = [line.split()[0].split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in found}


def test_constraints_hold_every_dependency_in_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    constraints = pinned("constraints.txt")
    texts = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        texts.extend(extra)
    for requirement in map(Requirement, texts):
        if requirement.name == project["name"]:  # an extra made of others
            continue
        version = constraints.get(requirement.name.lower())
        assert version is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(version), requirement


def test_constraints_are_what_is_installed() -> None:
    wrong = {}
    for name, version in pinned("constraints.txt").items():
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), (
            f"{name}: a released version, no local one"
        )
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed = importlib.metadata.version(name).partition("+")[0]
            if installed != version:
                wrong[name] = (installed, version)
    assert not wrong


def test_data_packages_are_those_that_are_read_and_have_hashes() -> None:
    data = pinned("requirements-data.txt")
    needed = {packaged.package: packaged.version for packaged in PACKAGED.values()}
    for model in PACKAGED_MODELS.values():
        needed |= dict(text.split("==") for text in (model.package, *model.needs))
    # Its wheels differ by platform, so no one hash would do; only the digits are read from it.
    needed.pop("scikit-learn")
    assert data == needed
    text = (ROOT / "requirements-data.txt").read_text()
    assert len(re.findall(r"--hash=sha256:[0-9a-f]{64}", text)) == len(data)
    assert not set(data) & set(pinned("constraints.txt"))


def test_nothing_names_a_machine_or_a_registry() -> None:
    forbidden = re.compile(
        "|".join(["/wo" + "rk/", "/ro" + "ot/", r"py" + r"pi\.org", "/op" + "t/"])
    )
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [ROOT / name for name in listed.stdout.splitlines()]
    assert len(files) > 50
    for file in files:
        if file.is_file() and file.name != "LICENSE":
            found = forbidden.search(file.read_text(encoding="utf-8", errors="replace"))
            assert found is None, f"{file} names {found}"
