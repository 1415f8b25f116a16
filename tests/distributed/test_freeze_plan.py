"""A run with the written plan is the run with the policy that it was made from, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_ft.recipe import load_recipe
from dist_ft.train.freeze_plan import write_freeze_plan
from tests.helpers.tiny_run import events, state_hash, train, write_recipe

POLICIES: list[dict[str, Any]] = [
    {"policy": "gradual", "every": "0.5ep", "groups_per_phase": 2, "returning": "reset"},
    {"policy": "bottom_up", "every": "7step", "max_depth": 3},
    {
        "policy": "random_block",
        "blocks": 1,
        "every": "2step",  # in 12 draws every block is drawn
        "always": ["pooler", "head.*"],
        "prefix_dropout": False,
    },
    {"policy": "static", "trainable": ["block.1", "head.*"], "layer_groups": {}},
]


def with_freezing(recipe: Path, freezing: dict[str, Any], *, name: str) -> Path:
    body = yaml.safe_load(recipe.read_text())
    path = recipe.with_name(f"{name}.yaml")
    path.write_text(yaml.safe_dump({**body, "name": name, "freezing": freezing}))
    return path


def phases(run: Path) -> list[tuple[int, list[str], str]]:
    found = [e for e in events(run) if e["event"] == "phase"]
    # A period that draws the same blocks again is announced, but it is no new phase.
    seen: list[tuple[int, list[str], str]] = []
    for e in found:
        if not seen or seen[-1][1] != e["trainable_groups"]:
            seen.append((e["step"], e["trainable_groups"], e["switch"]))
    return seen


@pytest.mark.parametrize("freezing", POLICIES, ids=lambda f: f["policy"])
def test_the_plan_trains_as_the_policy_does(tmp_path: Path, freezing: dict[str, Any]) -> None:
    base = write_recipe(tmp_path, checkpoint={"every": "24step"})
    original = with_freezing(base, freezing, name="original")
    written = yaml.safe_load(write_freeze_plan(load_recipe(original)))["freezing"]
    assert written["policy"] == "explicit"
    planned = with_freezing(base, written, name="planned")
    for path in (original, planned):
        train(path)
    runs = tmp_path / "runs"
    assert phases(runs / "planned") == phases(runs / "original")
    assert len(phases(runs / "planned")) == len(written["phases"])
    assert state_hash(runs / "planned") == state_hash(runs / "original")
