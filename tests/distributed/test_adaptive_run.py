"""Measuring policies in whole runs: they change phase, all ranks alike, and resume inside."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny_run import events, state_hash, train, write_recipe

POLICIES: dict[str, dict[str, Any]] = {
    "plateau": {"policy": "plateau", "first": 1, "patience": 1, "min_delta": 0.5},
    "gradient_norm": {"policy": "adaptive", "every": "4step", "percentile": 80},
    "plasticity": {
        "policy": "adaptive",
        "signal": "plasticity",
        "every": "4step",
        "percentile": 80,
    },
    "random_block": {"policy": "random_block", "blocks": 2, "every": "3step"},
    "bottom_up": {"policy": "bottom_up", "every": "6step"},
}


@pytest.mark.parametrize("policy", list(POLICIES))
def test_a_policy_changes_phase_and_resumes_exactly(policy: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, evaluation={"every": "4step"}, logging={"groups_every": 6})
    text = recipe.read_text()
    recipe.write_text(_with_policy(text, POLICIES[policy]))
    train(recipe, ["name=straight"])
    phases = [e for e in events(tmp_path / "runs/straight") if e["event"] == "phase"]
    assert len(phases) > 1
    train(recipe, ["name=stopped"], stop_at=13, exit_code=75)
    train(recipe, ["name=stopped"], resume=True)
    assert state_hash(tmp_path / "runs/stopped") == state_hash(tmp_path / "runs/straight")
    groups = [e for e in events(tmp_path / "runs/straight") if e["event"] == "groups"]
    assert groups[-1]["drift"]["head.text"] > 0
    assert groups[-1]["gradient_norm"]["head.text"] > 0


def _with_policy(text: str, policy: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump({**yaml.safe_load(text), "freezing": policy})


def test_random_blocks_switch_in_place(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    recipe.write_text(_with_policy(recipe.read_text(), POLICIES["random_block"]))
    train(recipe)
    phases = [e for e in events(tmp_path / "runs/tiny") if e["event"] == "phase"]
    assert phases[0]["switch"] == "rebuild"
    assert {p["switch"] for p in phases[1:]} == {"in_place"}
