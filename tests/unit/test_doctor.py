"""What the doctor sees and says: known bad combinations, disks, ranks, DeepSpeed's operations."""

import contextlib
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dist_ft import cli
from dist_ft.config import Recipe
from dist_ft.doctor import (
    deepspeed_ops,
    findings,
    folders_of,
    known,
    machine,
    places,
    ranks,
    situation,
)
from dist_ft.doctor.situation import Situation, look_around
from dist_ft.launcher.processes import fork_rank
from dist_ft.recipe import load_recipe
from tests.helpers.forked import in_a_fork
from tests.helpers.run_distributed import run_distributed

TWO = ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090")
H100 = ("NVIDIA H100 80GB HBM3",) * 8
LOCK = (Path("ext/cpu_adam/lock"),)
# For each known combination: what makes it so, and the nearest thing that is fine.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "torchrun": (
        {"environment": {"TORCHELASTIC_RUN_ID": "1"}},
        {"environment": {"TORCHELASTIC_RUN_ID": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}},
    ),
    "interrupted compilation": ({"stale_locks": LOCK}, {"stale_locks": ()}),
    "shared memory": (
        {"gpus": H100, "shm_bytes": 64 * 2**20},
        {"gpus": H100[:1], "shm_bytes": 64 * 2**20},
    ),
    "GPUs without peer access": (
        {"gpus": TWO, "driver": "535.129.03"},
        {"gpus": TWO, "driver": "550.40.07"},
    ),
    "NVLink": (
        {"gpus": H100, "environment": {"NCCL_P2P_DISABLE": "1"}},
        {"gpus": TWO, "environment": {"NCCL_P2P_DISABLE": "1"}},
    ),
    "Linux kernel": ({"kernel": "5.4.0-150-generic"}, {"kernel": "5.15.0-91-generic"}),
    "CUDA toolkit": ({"cuda": "12.8", "toolkit": "11.8"}, {"cuda": "12.8", "toolkit": "12.4"}),
    "kernel cache": (
        {"gpus": H100, "file_systems": {"triton": "nfs4"}},
        {"gpus": H100, "file_systems": {"triton": "ext4"}},
    ),
    "locked memory": (
        {"infiniband": True, "memlock_bytes": 8 * 2**20},
        {"infiniband": True, "memlock_bytes": None},
    ),
    "network interface": (
        {"environment": {"GLOO_SOCKET_IFNAME": "^docker"}, "interfaces": frozenset({"lo", "eth0"})},
        {"environment": {"GLOO_SOCKET_IFNAME": "eth0"}, "interfaces": frozenset({"lo", "eth0"})},
    ),
    "NCCL twice": (
        {"packages": frozenset({"nvidia-nccl-cu12", "nvidia-nccl-cu13"})},
        {"packages": frozenset({"nvidia-nccl-cu13", "nvidia-cudnn-cu13"})},
    ),
    "flash-attn": ({"flash_attention_error": "undefined symbol: _ZN3c10"}, {}),
    "open files": (
        {"open_files": 1024, "environment": {"WORLD_SIZE": "256"}},
        {"open_files": 1024, "environment": {"WORLD_SIZE": "8"}},
    ),
}


@pytest.mark.parametrize("one", known.KNOWN, ids=lambda one: one.name)
def test_a_known_combination_is_told_where_it_is_the_case(one: known.Known) -> None:
    bad, good = CASES[one.name]
    found = list(known.known_problems(replace(Situation(), **bad)))
    assert [f.name for f in found] == [one.name]
    assert found[0].status != "ok"
    assert one.remedy in found[0].remedy
    assert one.source in found[0].remedy
    (none,) = known.known_problems(replace(Situation(), **good))
    assert none.status == "ok"


def test_every_known_combination_has_a_case() -> None:
    assert set(CASES) == {one.name for one in known.KNOWN}


def test_this_machine_can_be_looked_at() -> None:
    here = look_around()
    assert here.kernel
    assert "lo" in here.interfaces
    assert "torch" in here.packages


def test_the_lock_of_a_killed_compilation_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "async_io" / "lock"
    lock.parent.mkdir()
    lock.touch()
    age = lock.stat().st_mtime
    assert deepspeed_ops.stale_locks(older_than_s=60, now_s=age + 61) == [lock]
    assert deepspeed_ops.stale_locks(older_than_s=60, now_s=age + 59) == []


def test_the_file_system_of_a_folder_is_that_of_the_deepest_mount(tmp_path: Path) -> None:
    inner = tmp_path / "a b"
    inner.mkdir()
    mounts = (
        "/dev/a / ext4 rw 0 0\n"
        f"server:/x {tmp_path} nfs4 rw,vers=4 0 0\n"
        f"server:/y {str(inner).replace(' ', chr(92) + '040')} lustre rw,flock 0 0\n"
    )
    assert places.file_system(inner / "not" / "yet", mounts=mounts) == ("lustre", "rw,flock")
    assert places.file_system(tmp_path, mounts=mounts) == ("nfs4", "rw,vers=4")
    assert places.file_system(Path("/"), mounts=mounts) == ("ext4", "rw")


def test_folders_on_one_disk_are_measured_once(tmp_path: Path) -> None:
    found = list(machine.disks({"run": tmp_path / "runs" / "a", "cache": tmp_path / "cache"}))
    assert [f.name for f in found] == ["disk of run", "disk of run, speed", "disk of cache"]
    assert "MB/s written" in found[1].value
    assert "the same as of run" in found[2].value
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told_though_its_disk_is_known() -> None:
    with tempfile.TemporaryDirectory() as name:
        run, closed = Path(name) / "run", Path(name) / "closed"
        run.mkdir()
        closed.mkdir(mode=0o555)
        for folder in (run.parent, run):
            folder.chmod(0o777)

        def look() -> None:
            if os.geteuid() == 0:  # who may write everywhere
                os.setuid(65534)
            tempfile.tempdir = str(run)
            found = list(machine.disks({"run": run, "data": closed / "shards", "cache": run}))
            assert [f.name for f in found if f.is_broken] == ["disk of data"]
            assert "can't be written" in found[-2].value
            assert "the same as of run" in found[-1].value

        in_a_fork(look)


def test_a_compiler_that_does_not_answer_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvcc"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    tool.write_text("#!/bin/sh\necho 'nvcc: a compiler'\necho 'tools, release 12.4, V12.4.1'\n")
    tool.chmod(0o755)
    assert situation._nvcc() == "12.4"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(situation, "_TOOL_TIMEOUT_S", 0.2)
    assert situation._nvcc() == ""


def test_a_disk_without_locks_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        del descriptor, operation
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(machine.fcntl, "flock", flock)
    found = list(machine.disks({"run": tmp_path}))
    assert found[-1].is_broken
    assert "-o flock" in found[-1].remedy


def test_the_folders_are_the_recipes(tmp_path: Path) -> None:
    recipe: Recipe = load_recipe(
        "cpu-spam", overrides=[f"cache.dir={tmp_path}", "output_dir=runs", "data_dir=shards"]
    )
    folders = folders_of(recipe)
    assert list(folders) == ["run", "data", "cache"]
    assert folders["run"].name == "cpu-spam"
    assert folders["cache"] == tmp_path


def _between_ranks_of_a_launcher() -> None:
    """As `dist-ft launch doctor` does, with ranks that have met already."""
    dist.barrier()
    measured = ranks.measure_all_reduce("cpu")
    assert (measured.ranks, measured.hosts, measured.backend) == (2, 1, "gloo")
    assert 0 < measured.latency_s < measured.seconds
    assert measured.bus_mb_s == pytest.approx(16 * 2**20 / 1e6 / measured.seconds)


def test_ranks_measure_an_all_reduce() -> None:
    run_distributed(_between_ranks_of_a_launcher)


def test_a_wrong_sum_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(block: Any) -> float:
        block.fill_(4.0)
        return 1.0

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(ranks, "_timed_all_reduce", wrong)
    with pytest.raises(RuntimeError, match=r"returned 4.0 on rank 1 instead of 3.0"):
        ranks.measure_all_reduce("cpu")


@pytest.mark.parametrize(("silent", "said"), [(False, "no such network"), (True, "within 1 s")])
def test_local_ranks_that_fail_or_hang_are_told(
    silent: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rank(place: ranks.LocalRank) -> int:
        if silent:
            os.read(os.pipe()[0], 1)  # for ever
        (Path(place.folder) / f"error.{place.rank}").write_text("no such network")
        return 1

    pids: list[int] = []

    def start(place: ranks.LocalRank, *, forked: bool) -> Any:
        assert forked

        def begin(environment: Any) -> Any:
            process = fork_rank(lambda: rank(place))(environment)
            pids.append(process.pid)
            return process

        return begin

    monkeypatch.setattr(ranks, "LOCAL_RANKS_S", 1)
    monkeypatch.setattr(ranks, "_start", start)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RuntimeError, match=said):
        list(ranks.between_ranks())
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)  # none of them goes on


def test_an_operation_that_cannot_be_compiled_says_what_it_needs() -> None:
    class Needs:
        name = "async_io"

        def is_compatible(self, verbose: bool) -> bool:
            if verbose:
                print("\x1b[93m [WARNING] \x1b[0m async_io requires the dev libaio .so object.")  # noqa: T201
            return False

    class Raises:
        name = "quantizer"

        def is_compatible(self, verbose: bool) -> bool:
            raise OSError(f"CUDA_HOME does not exist {verbose}")

    assert deepspeed_ops._problem(Needs()) == "requires the dev libaio .so object"
    assert deepspeed_ops._problem(Raises()) == "CUDA_HOME does not exist True"


def test_beside_rank_0_only_what_is_broken_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    found = [findings.Finding("a", "1"), findings.Finding("b", "2", "broken", "mend [it]")]
    findings.print_findings(found, rank=3)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "[rank 3] b: 2: mend [it]\n"


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_of_a_finding_is_cut(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    path = "/scratch/" + "a_long_folder/" * 8 + "runs"
    found = [
        findings.Finding("kernel linear_cross_entropy, bf16", "chunked, right on test numbers"),
        findings.Finding("disk of run", f"54.7 GiB free in {path}", "note", "look at GLOO_NAME"),
    ]
    findings.print_findings(found)
    text = capsys.readouterr().out
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    assert "linear_cross_entropy," in text
    assert "54.7 GiB free in" in text
    assert path in "".join(re.split(r"[│\s]+", text))
    assert "-> look at GLOO_NAME" in text


def test_the_command_measures_between_the_ranks_of_a_launcher(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def quick(folders: Any = None) -> list[findings.Finding]:
        del folders
        return findings.run_probes({"between ranks": ranks.between_ranks})

    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("dist_ft.doctor.examine", quick)
    monkeypatch.setattr("dist_ft.doctor.examine_rank", quick)
    assert cli.main(["launch", "--nproc", "2", "doctor"]) == 0
    said = capfd.readouterr().out
    assert said.count("MB/s (all-reduce of 16 MiB by 2") == 1
