import errno
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from dist_ft import cli
from dist_ft.recipe import RecipeError, packaged_recipes

ROOT = Path(__file__).parents[2]


def run(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dist_ft", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_help_names_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    names = "prepare train evaluate export report check doctor data search freeze-plan plan kernels"
    for command in names.split():
        assert f"\n  {command} " in done.stdout
    assert "75 stopped after" in done.stdout


def test_help_imports_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys; from dist_ft.cli import main; main(['--help']);"
        "sys.exit(any(m in sys.modules for m in ('torch', 'pydantic', 'rich', 'pyarrow')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_check_imports_neither_torch_nor_transformers() -> None:
    heavy = ("torch", "transformers", "deepspeed", "datasets", "accelerate")
    code = (
        "import sys; from dist_ft.cli import main; assert main(['check', 'quickstart']) == 0;"
        f"sys.exit(', '.join(m for m in {heavy} if m in sys.modules) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("program", "leaks"),
    [
        (
            "import gc; gc.freeze()",
            True,
        ),  # what opening an engine did, and shows what is heard then
        ("from dist_ft.engine.ds_detach import exempt_from_collection as e; e()", False),
    ],
)
def test_a_process_with_an_open_engine_ends_without_a_list_of_leaks(
    program: str, leaks: bool
) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, triton; {program}; sys.exit(75)"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ("nanobind: leaked" in done.stderr) == leaks
    assert done.returncode == 75


@pytest.mark.parametrize("command", ["prepare", "train", "evaluate", "export", "report", "check"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    assert "Usage:" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dist-ft 0.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], ""),
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument"),
        (["train", "quickstart", "--fast"], "No such option"),
        (["report"], "Missing argument"),
        (["recipes", "show", "quick"], "no packaged recipe 'quick': use one of bart-"),
    ],
)
def test_bad_arguments_end_with_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["evaluate"], ["export"], ["report"]])
def test_a_folder_without_a_run_is_one_line(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words, str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path} holds no run (no recipe.json): name a folder that train has made\n"
    )


def test_check_of_a_good_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "quickstart", "tasks.trec.max_length=40"]) == 0
    assert "no errors" in capsys.readouterr().out


def test_check_says_what_it_takes_for_granted_and_who_can_share_a_batch(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["check", "quickstart", "model.path=modles/bert", "tasks.trec.data.train=data/tickets"]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        f"note: {place}: '{path}' is no file or folder here: taken as a hub id, not checked"
        for place, path in (("model.path", "modles/bert"),
                            ("tasks.trec.data.train", "data/tickets"))
    ]  # fmt: skip
    assert len(lines) == 3
    assert "no errors" in lines[2]
    for ranks, code in (("1", 0), ("3", 2)):
        assert cli.main(["check", "quickstart", "--ranks", ranks]) == code
    out, err = capsys.readouterr()
    assert "cannot be shared equally by 3 ranks" in out.splitlines()[-1]
    assert err == ""


def test_check_prints_the_errors_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "quickstart", "sed=1", "optim.lr=-1"]) == 2
    out, err = capsys.readouterr()
    assert err == ""
    assert sorted(line.partition(":")[0] for line in out.splitlines()) == ["optim.lr", "sed"]


def test_train_says_recipe_errors_on_rank_0_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 2), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["train", "quickstart", "sed=1", "optim.lr=-1"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == lines


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("seed: must be\n positive"), 2, "error: seed: must be positive"),
        (RuntimeError("no network"), 1, "error: no network"),
        (FileNotFoundError(2, "No such file", "x"), 1, "error: [Errno 2] No such file: 'x'"),
        (RuntimeError(), 1, "error: RuntimeError"),
        (RecipeError(["a: b", "c: d"]), 2, "error: a: b\nerror: c: d"),
    ],
)
def test_errors_are_lines_and_codes(
    error: Exception,
    code: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_load", fails)
    assert cli.main(["train", "quickstart"]) == code
    assert capsys.readouterr().err == line + "\n"
    assert cli.main(["train", "quickstart", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(errno.ESTALE, 1), (errno.EIO, 1), (errno.ENOENT, 2)])
def test_a_disk_that_is_away_is_no_bad_recipe(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher starts ranks again that have failed, and none whose input is bad."""
    error = ValueError("shard x can't be read")
    error.__cause__ = OSError(number, os.strerror(number))
    monkeypatch.setattr(cli, "_load", Mock(side_effect=error))
    assert cli.main(["train", "quickstart"]) == code


def test_an_unexpected_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(cli, "_load", fails)
    with pytest.raises(KeyError):
        cli.main(["train", "quickstart"])


def test_recipes_are_listed_shown_and_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = packaged_recipes()["quickstart"].read_text()
    for words in (["recipes"], ["recipes", "ls"]):
        assert cli.main(words) == 0
        assert "\nquickstart " in capsys.readouterr().out
    assert cli.main(["recipes", "show", "quickstart"]) == 0
    assert capsys.readouterr().out == text
    assert cli.main(["recipes", "cp", "quickstart"]) == 0
    assert (tmp_path / "quickstart.yaml").read_text() == text
    assert cli.main(["check", "quickstart.yaml"]) == 0
    capsys.readouterr()
    assert cli.main(["recipes", "cp", "quickstart"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["recipes", "cp", "quickstart", "absent/q.yaml"]) == 2
    (tmp_path / "folder").mkdir()
    assert cli.main(["recipes", "cp", "quickstart", "folder"]) == 0
    assert (tmp_path / "folder" / "quickstart.yaml").is_file()


def test_doctor_finds_this_environment_whole() -> None:
    done = run("doctor", DS_ACCELERATOR="cpu", COLUMNS="160")
    assert done.returncode == 0, done.stdout
    for found in (
        "python", "gloo", "gloo between ranks", "deepspeed accelerator", "deepspeed ops, built",
        "kernel attention, bf16", "memory", "disk of run, speed", "known bad combinations",
    ):  # fmt: skip
        assert found in done.stdout


def test_doctor_ends_with_1_when_something_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_ft.doctor import findings, probes

    run_probes = findings.run_probes

    def breaks() -> list[findings.Finding]:
        raise OSError("no disk")

    monkeypatch.setattr(probes, "run_probes", lambda _: run_probes({"disk": breaks}))
    assert cli.main(["doctor"]) == 1
    assert "no disk" in capsys.readouterr().out


def test_train_on_several_ranks_leads_to_the_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "quickstart", "--nproc", "2"]) == 2
    assert "`dist-ft launch --nproc 2 train quickstart`" in capsys.readouterr().err
