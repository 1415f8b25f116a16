"""A run that is stopped and goes on ends exactly where an undisturbed one does."""

import itertools
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_ft.engine.loss_module import LossModule
from dist_ft.recipe import load_recipe
from dist_ft.train import build
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny_run import events, newest_checkpoint, state_hash, train, write_recipe


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_sigterm_at_a_random_step_changes_nothing(
    stage: int, precision: str, tmp_path: Path
) -> None:
    engine = [f"engine.zero_stage={stage}", f"engine.precision={precision}"]
    recipe = write_recipe(tmp_path)
    train(recipe, [*engine, "name=straight"])
    # Early enough that the signal, which is sent from a thread, always comes before the end.
    stop_at = random.Random(f"{stage}{precision}").randint(1, 14)
    train(recipe, [*engine, "name=stopped"], stop_at=stop_at, exit_code=75)
    stopped = events(tmp_path / "runs/stopped")[-1]
    assert stopped["event"] == "stop"
    assert stop_at <= stopped["step"] < 24
    train(recipe, [*engine, "name=stopped"], resume=True)
    assert newest_checkpoint(tmp_path / "runs/stopped").name == "step-00000024"
    assert state_hash(tmp_path / "runs/stopped") == state_hash(tmp_path / "runs/straight")


def test_another_world_size_and_stage_may_go_on(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train={"micro_batch_size": 2})
    train(recipe, ["name=a"], stop_at=9, exit_code=75)
    train(recipe, ["name=a", "engine.zero_stage=3"], world_size=4, resume=True)
    assert newest_checkpoint(tmp_path / "runs/a").name == "step-00000024"


def test_resuming_with_another_recipe_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    train(recipe, ["name=a"], stop_at=5, exit_code=75)
    with pytest.raises(Exception, match=r"optim\.lr \(was 0\.001, is 0\.5\)"):
        train(recipe, ["name=a", "optim.lr=0.5"], resume=True)
    with pytest.raises(Exception, match="holds a run already"):
        train(recipe, ["name=a"])


def test_the_record_has_every_event(tmp_path: Path) -> None:
    train(write_recipe(tmp_path))
    found = events(tmp_path / "runs/tiny")
    kinds = [e["event"] for e in found]
    assert kinds.count("phase") == 3
    assert kinds.count("checkpoint") == 3
    assert {e["task"] for e in found if e["event"] == "eval"} == {"text", "tags", "spans"}
    for event in found:
        if event["event"] == "step":
            assert {"task", "loss", "lr", "grad_norm", "tokens", "tokens_per_s"} <= event.keys()
        if event["event"] == "phase":
            assert event["optimizer_bytes_per_rank"] > 0
    params = [e["trainable_params"] for e in found if e["event"] == "phase"]
    assert params == sorted(params)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_stop_before_the_first_step_saves_nothing_and_can_go_on(
    stage: int, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, engine={"zero_stage": stage})
    train(recipe, stop_at=0, exit_code=75)
    assert not list((tmp_path / "runs/tiny").glob("checkpoints/step-*"))
    train(recipe, resume=True)
    train(recipe, ["name=straight"])
    assert state_hash(tmp_path / "runs/tiny") == state_hash(tmp_path / "runs/straight")


def test_step_events_know_what_trains_after_a_resume(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    train(recipe, stop_at=10, exit_code=75)
    train(recipe, resume=True)
    assert all(
        e["trainable_params"] > 0 for e in events(tmp_path / "runs/tiny") if e["event"] == "step"
    )


# Run, forward without gradient at which rank 1 is asked to stop (0 is none), and exit code. An
# evaluation has 17 of them: those of step 4 (twice) and of the last step are broken off.
RUNS = (
    ("straight", 0, 0),
    ("stopped", 20, 75),
    ("stopped", 1, 75),
    ("stopped", 20, 75),
    ("stopped", 0, 0),
)
PLATEAU = "freezing={policy: plateau, first: 1, patience: 1}"


def _is_stopped_while_it_scores(path: Path) -> None:
    build.dist.shut_down = lambda: None  # the ranks stay together; this process ends with them
    forward = LossModule.forward
    for name, stop_at, exit_code in RUNS:
        count = itertools.count(1)
        last = [0]

        def watched(
            self: LossModule, *args: Any, at: int = stop_at, count: Any = count, last: Any = last
        ) -> Any:
            if not torch.is_grad_enabled():
                last[0] = next(count)
                if last[0] == at and os.environ["RANK"] == "1":
                    os.kill(os.getpid(), signal.SIGTERM)
            return forward(self, *args)

        LossModule.forward = watched  # pyright: ignore[reportAttributeAccessIssue]
        recipe = load_recipe(path, overrides=[f"name={name}", PLATEAU])
        resume = (recipe.output_dir / name).exists()
        dist.barrier()
        assert build.train(recipe, resume=resume) == exit_code
        assert last[0] == stop_at or not stop_at  # no other micro-batch was scored


def test_a_stop_leaves_an_evaluation_which_is_done_when_the_run_goes_on(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path,
        train={"max_duration": "6step"},
        # Its first decision is due at step 4, and takes the scores of that step into account.
        mixture={"policy": "bandit", "every": 8, "reward": "gain"},
        evaluation={"every": "2step", "micro_batch_size": 1},
        checkpoint={"every": "6step", "keep_best": True},
    )
    run_distributed(_is_stopped_while_it_scores, path)
    runs = tmp_path / "runs/straight", tmp_path / "runs/stopped"
    assert [e["step"] for e in events(runs[1]) if e["event"] == "stop"] == [4, 4, 6]
    straight, stopped = (
        {
            "scores": [
                (e["step"], e["task"], e["metrics"]) for e in events(run) if e["event"] == "eval"
            ],
            "shares": [(e["step"], e["shares"]) for e in events(run) if e["event"] == "mixture"],
            "trainer": json.loads((newest_checkpoint(run) / "trainer.json").read_text()),
            "state": state_hash(run),
        }
        for run in runs
    )
    assert stopped == straight
    assert straight["trainer"]["progress"]["step"] == 6
