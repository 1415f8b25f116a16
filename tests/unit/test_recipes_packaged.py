"""The recipes that come with dist_ft: each is whole, fits where it says, and the cheap ones run."""

import re
from pathlib import Path

import pytest

from dist_ft import cli
from dist_ft.planning.run import PlanRequest, plan_recipe
from dist_ft.recipe import load_recipe, packaged_recipes
from tests.helpers.tiny_run import events, train

RECIPES = packaged_recipes()
LINES = ("What", "Command", "Plan", "Expected", "Hardware")


def _header(name: str) -> dict[str, str]:
    text = RECIPES[name].read_text()
    return dict(re.findall(r"^# (\w+): +(.*)$", text, re.MULTILINE))


def test_there_are_enough_and_they_say_what_they_are() -> None:
    assert len(RECIPES) >= 20
    for name in RECIPES:
        header = _header(name)
        assert set(LINES) <= set(header), name
        assert name == "quickstart" or {"Time", "Memory"} <= set(header), name
        assert header["Plan"].startswith(f"dist-ft plan {name} "), name


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_passes_check_and_fits_where_it_says(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    header = _header(name)
    words = header["Plan"].split()[3:]
    given = dict(zip(words[::2], words[1::2], strict=True))
    request = PlanRequest(
        nodes=int(given.get("--nodes", 1)), gpus=int(given["--gpus"]), gpu=given["--gpu"]
    )
    plan = plan_recipe(recipe, request).plan
    assert plan.fits
    if "Memory" in header:
        stated = float(header["Memory"].split()[0])
        assert stated == pytest.approx(plan.peak.memory.total / 2**30, rel=0.05, abs=0.02)


def test_every_freezing_policy_and_task_type_has_a_recipe() -> None:
    recipes = [load_recipe(name, needs_files=False) for name in RECIPES]
    assert {r.freezing.policy for r in recipes} == {
        "none", "static", "gradual", "bottom_up", "plateau", "adaptive", "random_block", "explicit",
    }  # fmt: skip
    assert {t.type for r in recipes for t in r.tasks} == {
        "text_classification", "token_classification", "question_answering", "generation",
    }  # fmt: skip
    assert {r.engine.zero_stage for r in recipes} == {1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu-ner-augmented"])
def test_a_cheap_recipe_runs(name: str, tmp_path: Path) -> None:
    train(
        Path(name),
        [f"output_dir={tmp_path}", f"data_dir={tmp_path / 'data'}", "train.max_duration=4step",
         "optim.schedule.warmup=1step"],
        world_size=1,
    )  # fmt: skip
    found = events(tmp_path / name)
    assert found[-1]["event"] == "end"
    assert found[-1]["step"] == 4


def test_the_list_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(RECIPES)
    assert all(len(line.split()) > 4 for line in lines)
