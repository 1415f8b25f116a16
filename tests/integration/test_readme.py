"""What the README says is true: its recipe, its commands, its reference."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dist_ft.recipe import load_recipe
from dist_ft.recipe.schema import ROOT as SCHEMA
from dist_ft.recipe.schema import Place

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# On its own these end in a test run or in a second environment.
RUN_BY_CI = {"bash launch/quickstart.sh", "bash launch/test.sh", "make check", "make test"}
RUN_BY_CI |= {"source .venv/bin/activate", "bash launch/install.sh"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the README's recipe and more rows like those of its table."""
    place = tmp_path_factory.mktemp("readme")
    (recipe,) = blocks("yaml")
    (place / "tickets.yaml").write_text(recipe)
    header, *rows = blocks("csv")[0].splitlines()
    lines = [header]
    for number in range(30):
        for row in rows:
            text, _, label = row.rpartition(",")
            lines.append(f"{text} ({number}),{label}")
    (place / "train.csv").write_text("\n".join(lines) + "\n")
    return place


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the README in the folder, with this interpreter."""
    command = re.sub(r"^dist-ft\b", f"{shlex.quote(sys.executable)} -m dist_ft", command)
    command = command.replace("launch/", f"{shlex.quote(str(ROOT))}/launch/")
    variables = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_the_recipe_is_valid(folder: Path) -> None:
    recipe = load_recipe(folder / "tickets.yaml")
    assert recipe.output_dir == folder / "runs"


def test_every_command_is_known() -> None:
    assert len(commands()) > 8
    for command in commands():
        if command in RUN_BY_CI:
            continue
        assert command.startswith("dist-ft "), command


@pytest.mark.slow
def test_the_commands_for_own_data_work_one_after_the_other(folder: Path) -> None:
    wanted = [c for c in commands() if re.match(r"dist-ft (?!launch)", c)]
    assert [c.split()[1] for c in wanted] == ["check", "train", "evaluate", "export", "report"]
    for command in wanted:
        done = run(command, folder)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    # As the README's last block: without dist_ft.
    (code,) = blocks("python")
    code = "import sys; sys.modules['dist_ft'] = None\n" + code + "print(classify('it broke'))\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"'label': '(complaint|question|praise)'", done.stdout)


@pytest.mark.slow
def test_the_command_for_two_ranks_works(folder: Path) -> None:
    (command,) = [c for c in commands() if c.startswith("dist-ft launch --nproc 2")]
    done = run(command, folder)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert (folder / "runs" / "tickets-b" / "metrics.jsonl").is_file()


def keys_of(place: Place) -> set[str]:
    found: set[str] = set()
    for member in place.members:
        section = Place(member)
        for key in section.keys:
            child = section.child(key)
            found |= {key} | keys_of(child)
            for item in child.members:
                found |= keys_of(Place(item).child(0)) if not Place(item).keys else set()
    return found


def test_the_reference_names_every_key_of_the_schema() -> None:
    reference = README.partition("## Recipe reference")[2].partition("\n## ")[0]
    words = set(re.findall(r"\w+", reference))
    keys = keys_of(SCHEMA)
    assert {"zero_stage", "doc_stride", "warmup", "patience"} <= keys
    assert keys - words == set()


def test_the_tests_that_the_table_of_faults_names_are_there() -> None:
    table = README.partition("## Faults")[2].partition("\n## ")[0]
    files = {path.stem: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    rows = [line for line in table.splitlines() if re.match(r"\| \d+ \|", line)]
    assert len({line.split("|")[1] for line in rows}) == 20
    for line in rows:
        named = re.findall(r"`(?:[a-z]+/)*(test_\w+)(?:\.py)?`", line)
        assert named, line
        for name in named:
            is_test = any(f"def {name}(" in text for text in files.values())
            assert name in files or is_test, name
