"""What the launcher does when signals come early, its output goes away, or a disk does not answer.

Ranks are forks of this process that do almost nothing; the faults are real.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dist_ft.heartbeat import Heartbeat, show_stacks_when_asked
from dist_ft.launcher import output, settings
from dist_ft.launcher.processes import fork_rank, run_rank
from dist_ft.launcher.settings import LaunchSettings, count_gpus
from dist_ft.launcher.supervisor import Failure, Supervisor
from dist_ft.train.signals import StopRequest

ROOT = Path(__file__).parents[2]


def run(
    main: Callable[[], int],
    *,
    ranks: int = 1,
    say: Callable[[str], None] | None = None,
    logs: Path | None = None,
) -> tuple[int, list[str], float]:
    """Run ranks without a restart; return the exit code, what was said, and the seconds."""
    said: list[str] = []
    settings = LaunchSettings(ranks=ranks, max_restarts=0, grace_s=20)
    supervisor = Supervisor(
        settings, start=lambda _: fork_rank(main), say=say or said.append, logs=logs
    )
    began = time.monotonic()
    return supervisor.run(), said, time.monotonic() - began


def listen_late(*, after_s: float) -> int:
    """Do as a rank that imports for a while, then listens and saves when it is asked."""
    time.sleep(after_s)
    stop = StopRequest()
    with stop.listening():
        deadline = time.monotonic() + 10
        while not stop.signal and time.monotonic() < deadline:
            time.sleep(0.02)
    return 75 if stop.signal else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_scheduler_that_signals_every_process_early_gets_75(number: int) -> None:
    launcher = os.getpid()

    def main() -> int:
        if os.environ["RANK"] == "0":
            time.sleep(0.2)
            for process in (launcher, *children(launcher)):
                os.kill(process, number)
        return listen_late(after_s=0.5)

    code, said, _ = run(main, ranks=2)
    assert (code, said) == (75, [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_rank_that_alone_is_signalled_early_hears_it_later(number: int) -> None:
    def main() -> int:
        os.kill(os.getpid(), number)
        return listen_late(after_s=0.1)

    code, said, seconds = run(main)
    assert (code, said) == (75, [])
    assert seconds < 5


def children(pid: int) -> list[int]:
    """Return the child processes of a process."""
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_new_program_holds_early_signals_back_as_well() -> None:
    asks = "import os; [os.kill(p, n) for p in (os.getppid(), os.getpid()) for n in (1, 2, 15, 10)]"
    command = [sys.executable, "-c", f"{asks}; os._exit(75)"]
    supervisor = Supervisor(LaunchSettings(ranks=1), start=lambda _: run_rank(command), say=print)
    assert supervisor.run() == 75


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 75),  # before it listened
        (lambda: os._exit(76), 75),  # wants a smaller plan, when the run goes on
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), 143),
        (lambda: os._exit(1), 143),
    ],
    ids=["signal", "replan", "crash", "error"],
)
def test_ranks_that_end_after_a_request_to_stop_have_failed_only_if_something_is_wrong(
    end: Callable[[], None], code: int
) -> None:
    launcher = os.getpid()

    def main() -> int:
        os.kill(launcher, signal.SIGTERM)
        time.sleep(0.2)
        end()
        return 0

    settings = LaunchSettings(ranks=1)
    said: list[str] = []
    start = fork_rank(main, listens=False)  # as a rank that was signalled before it held it back
    assert Supervisor(settings, start=lambda _: start, say=said.append).run() == code
    assert "not started again: a stop was asked for" in said[0]


def test_ranks_that_do_not_save_in_time_were_asked_to_stop() -> None:
    launcher = os.getpid()

    def main() -> int:
        os.kill(launcher, signal.SIGTERM)
        while True:
            time.sleep(0.1)

    settings = LaunchSettings(ranks=1, max_restarts=0, grace_s=0.5)
    said: list[str] = []
    # Slurm's script requeues a job for it, and none that has failed.
    assert Supervisor(settings, start=lambda _: fork_rank(main), say=said.append).run() == 143
    assert said == ["the ranks did not end within 0.5 s: killed"]


def test_the_record_of_a_failure_has_what_it_had() -> None:
    failure = Failure(1, "was killed by SIGTERM", "step", 4, signalled=True, stopped=True)
    assert json.loads(failure.to_json()) == {
        "rank": 1, "reason": "was killed by SIGTERM", "section": "step", "step": 4,
        "signalled": True, "replanned": False,
    }  # fmt: skip


@contextmanager
def ignored(number: int) -> Iterator[None]:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_the_launcher_was_started_with_ignored_stays_ignored(number: int) -> None:
    launcher = os.getpid()

    def main() -> int:
        time.sleep(0.1)
        os.kill(launcher, number)
        os.kill(os.getpid(), number)
        stop = StopRequest()
        with stop.listening():
            os.kill(os.getpid(), number)
            time.sleep(0.2)
        os.kill(os.getpid(), number)
        return 3 if stop.signal else 0

    with ignored(number):
        assert run(main)[:2] == (0, [])


def test_usr1_is_heard_though_scripts_ignore_it_until_then() -> None:
    launcher = os.getpid()

    def main() -> int:
        os.kill(launcher, signal.SIGUSR1)
        return listen_late(after_s=0.1)

    with ignored(signal.SIGUSR1):
        assert run(main)[:2] == (75, [])


@pytest.mark.parametrize("lost", [BrokenPipeError, OSError])
def test_what_nobody_reads_is_in_the_log_and_ends_nothing(
    lost: type[OSError], tmp_path: Path
) -> None:
    def say(text: str) -> None:
        raise lost(text)

    code, _, _ = run(lambda: 1, say=say, logs=tmp_path / "logs")
    assert code == 1
    assert "ended with exit code 1" in (tmp_path / "logs/supervisor.log").read_text()


def buffered() -> dict[str, str]:
    """Return an environment in which what is printed is written later."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def test_a_rank_without_output_ends_as_itself_and_touches_nothing_of_its_launcher(
    tmp_path: Path,
) -> None:
    # The reader of the pipe is gone: flushing raises, in the launcher and in each rank.
    program = f"""
        import os, sys, time
        from pathlib import Path
        from dist_ft.heartbeat import FOLDER
        from dist_ft.launcher.processes import fork_rank
        from dist_ft.launcher.settings import LaunchSettings
        from dist_ft.launcher.supervisor import Supervisor

        mark = Path({str(tmp_path / "mark")!r})

        def main():
            if os.environ["RANK"] == "0":
                print("lost")
                return 75
            time.sleep(1)
            mark.write_text(str(Path(os.environ[FOLDER]).is_dir()))
            return 75

        print("lost, too")
        supervisor = Supervisor(LaunchSettings(ranks=2), start=lambda _: fork_rank(main), say=print)
        code = supervisor.run()
        mark.write_text(mark.read_text() + f" {{code}} {{os.getpid()}}")
        os._exit(code)
    """
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=writer, cwd=ROOT, env=buffered()
    )
    os.close(writer)
    assert done.wait(timeout=30) == 75
    assert (tmp_path / "mark").read_text() == f"True 75 {done.pid}"


def test_a_launcher_whose_pipe_is_gone_ends_with_its_own_code() -> None:
    program = (
        "import sys; from dist_ft.cli_launch import _say; from dist_ft.launcher import output\n"
        "try: _say('x')\n"
        "except OSError: pass\n"
        "print('y'); output.let_go_of_lost_output(); sys.exit(75)"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writer, stderr=writer, cwd=ROOT, env=buffered(),
        check=False,
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == 75


def hang() -> int:
    """Beat once and then no more."""
    show_stacks_when_asked()
    Heartbeat.of_this_rank().beat("step", step=3, phase=0, timeout_s=0.2)
    time.sleep(60)
    return 0


def test_the_stacks_of_a_hang_are_kept(tmp_path: Path) -> None:
    code, said, _ = run(hang, logs=tmp_path / "logs")
    assert code == 1
    assert "rank 0 hung for" in said[0]
    assert "in hang" in (tmp_path / "logs/rank0.stacks").read_text()


def test_a_hang_is_ended_and_told_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file in the place of the folder")
    code, said, _ = run(hang, logs=tmp_path / "logs")
    assert code == 1
    assert "rank 0 hung for" in said[0]


def test_a_hang_is_ended_and_told_though_the_disk_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_PATIENCE_S", 0.3)
    # Opening a pipe waits for a reader, for ever.
    os.mkfifo(tmp_path / "supervisor.log")
    (tmp_path / "rank0.stacks").symlink_to("supervisor.log")
    code, said, seconds = run(hang, logs=tmp_path)
    assert code == 1
    assert "rank 0 hung for" in said[0]
    assert seconds < 10


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        ("", 0), ("-1", 0), ("NoDevFiles", 0), ("none", 0), ("0", 1), ("0,1", 2), (" 0 , 2", 2),
        ("0,-1,1", 1), ("1,none", 1), ("GPU-8932f937,GPU-1", 2), ("MIG-GPU-8932f937/1/2", 1),
    ],
)  # fmt: skip
def test_visible_gpus_are_counted_as_cuda_does(
    visible: str, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus() == gpus


def test_gpus_are_found_without_their_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container, where ranks would run on CPUs beside GPUs that torch finds."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(settings.shutil, "which", lambda _: None)
    monkeypatch.setattr(settings, "Path", lambda path: tmp_path / path.lstrip("/"))
    (tmp_path / "dev").mkdir()
    assert count_gpus() == 0
    version = "2.13.0+rocm6.4"
    monkeypatch.setattr(settings.importlib.metadata, "version", lambda _: version)
    for number, gpu in enumerate(("0", "4711", "4712")):  # the first one is the CPU
        node = tmp_path / f"sys/class/kfd/kfd/topology/nodes/{number}"
        node.mkdir(parents=True)
        (node / "gpu_id").write_text(f"{gpu}\n")
    assert count_gpus() == 2
    with monkeypatch.context() as patch:
        patch.setenv("ROCR_VISIBLE_DEVICES", "1")
        assert count_gpus() == 1
    version = "2.13.0+cpu"  # on a desktop with a GPU that torch can't use
    assert count_gpus() == 0
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert count_gpus() == 3
