"""A run whose mixture follows the losses: one decision for all ranks, exact after a stop."""

from pathlib import Path

import yaml

from tests.helpers.tiny_run import events, state_hash, train, write_recipe


def test_decisions_are_part_of_the_run(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, engine={"zero_stage": 1})
    recipe = yaml.safe_load(path.read_text())
    recipe["mixture"] = {"policy": "bandit", "every": 8, "rate": 4.0, "smoothing": 0.0}
    recipe["train"]["max_duration"] = "18step"
    recipe["evaluation"] = recipe["checkpoint"] = {}
    path.write_text(yaml.safe_dump(recipe))
    runs = tmp_path / "runs"
    train(path, ["name=straight"])
    decided = [e for e in events(runs / "straight") if e["event"] == "mixture"]
    assert [e["step"] for e in decided] == [4, 12]
    assert [e["from_step"] for e in decided] == [8, 16]
    for event in decided:
        assert event["shares"].keys() == {"text", "tags", "spans"}
        assert abs(sum(event["shares"].values()) - 1) < 1e-3
    assert len({tuple(e["shares"].values()) for e in decided}) == 2
    # Between a decision and the block that it is for, where it has to be kept.
    train(path, ["name=stopped"], stop_at=5, exit_code=75)
    assert 5 <= events(runs / "stopped")[-1]["step"] < 18
    train(path, ["name=stopped"], resume=True)
    assert state_hash(runs / "stopped") == state_hash(runs / "straight")

    def tasks(run: Path) -> dict[int, str]:
        return {e["step"]: e["task"] for e in events(run) if e["event"] == "step"}

    assert tasks(runs / "stopped") == tasks(runs / "straight")
