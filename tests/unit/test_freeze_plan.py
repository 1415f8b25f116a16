"""`dist-ft freeze-plan`: what it writes and what it refuses."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_ft import cli
from dist_ft.config_freezing import FreezingBase
from dist_ft.train.freeze_plan import COMMON, in_runs
from tests.helpers.tiny_run import write_recipe


def recipe_with(folder: Path, freezing: dict[str, Any]) -> Path:
    path = write_recipe(folder)
    body = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**body, "freezing": freezing}))
    return path


def test_the_plan_is_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_with(tmp_path, {"policy": "gradual", "phases": 3, "groups_per_phase": 2})
    file = tmp_path / "plan.yaml"
    words = ["freeze-plan", str(recipe), "train.max_duration=30step", "--output", str(file)]
    assert cli.main(words) == 0
    assert str(file) in capsys.readouterr().out
    text = file.read_text()
    assert [(p["at"], len(p["trainable"])) for p in yaml.safe_load(text)["freezing"]["phases"]] == [
        ("0step", 4),
        ("10step", 6),
        ("20step", 9),
    ]
    shares = [line for line in text.splitlines() if "# phase" in line]
    assert "steps 0 to 9" in shares[0]
    assert "steps 20 to 29" in shares[2]
    assert "(100.0 %)" in shares[2]
    assert "every layer group trains in some phase" in text.replace("\n# ", " ")
    assert cli.main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main(words[:3]) == 0
    assert capsys.readouterr().out == text


def test_all_that_policies_share_goes_into_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {*COMMON, "switch"} == set(FreezingBase.model_fields)
    shared = {"returning": "reset", "frozen_embedding_rows": [[0, 5], [7, 9]]}
    recipe = recipe_with(tmp_path, {"policy": "gradual", "phases": 3, **shared})
    assert cli.main(["freeze-plan", str(recipe)]) == 0
    plan = yaml.safe_load(capsys.readouterr().out)["freezing"]
    assert {key: plan.get(key) for key in shared} == shared


def test_what_a_schedule_never_reaches_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_with(tmp_path, {"policy": "gradual", "phases": 3})
    assert cli.main(["freeze-plan", str(recipe), "train.max_duration=30step"]) == 0
    text = capsys.readouterr().out
    share = re.findall(r"# phase 2.*\((\d+\.\d) %\)", text)[0]
    assert (
        f"The last phase, from step 20 on, trains {share}% of the parameters; never trained: "
        "embeddings to block.1 (more freezing.phases or freezing.groups_per_phase reach them)."
    ) in text.replace("\n# ", " ")


@pytest.mark.parametrize(
    ("chosen", "text"),
    [("ab", "a to b"), ("acd", "a, c to d"), ("", ""), ("e", "e"), ("abcde", "a to e")],
)
def test_neighbours_are_told_as_one(chosen: str, text: str) -> None:
    assert in_runs("abcde", set(chosen)) == text


def test_periods_of_random_block_can_be_limited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    freezing = {"policy": "random_block", "blocks": 1, "every": "2step", "always": ["head.*"]}
    recipe = recipe_with(tmp_path, freezing)
    assert cli.main(["freeze-plan", str(recipe), "--periods", "3"]) == 0
    text = capsys.readouterr().out
    plan = yaml.safe_load(text)["freezing"]
    assert plan["switch"] == "in_place"
    assert max(int(p["at"].removesuffix("step")) for p in plan["phases"]) <= 4
    assert "change again at step" in text.replace("\n# ", " ")
    assert "Never trained here: " in text  # 3 of 4 blocks at most


@pytest.mark.parametrize(
    ("freezing", "words", "message"),
    [
        ({"policy": "plateau"}, [], "plateau decides its phases from measurements"),
        ({"policy": "adaptive", "every": "5step"}, [], "adaptive decides its phases"),
        ({"policy": "none"}, ["--periods", "2"], "only random_block has periods"),
        (
            {"policy": "random_block", "every": "2step"},
            ["--periods", "0"],
            "--periods must be at least 1, got 0",
        ),
    ],
)
def test_what_has_no_plan_is_refused(
    tmp_path: Path,
    freezing: dict[str, Any],
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = recipe_with(tmp_path, freezing)
    # A plateau policy needs evaluations; the tiny recipe has them.
    assert cli.main(["freeze-plan", str(recipe), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
