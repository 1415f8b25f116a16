"""Micro-batches by a budget of tokens: their number varies from step to step, the weights don't."""

import json
from pathlib import Path

import pytest

from dist_ft.model.backbone import load_tokenizer
from dist_ft.recipe import load_recipe
from dist_ft.train.data import prepare_tasks
from dist_ft.train.loading import make_loader, plan_steps
from dist_ft.train.parts import model_source
from tests.helpers.tiny_run import events, train, write_recipe

BUDGET = 40
STEPS = 6


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_recipe(
        tmp_path_factory.mktemp("budget"),
        train={
            "max_duration": f"{STEPS}step",
            "global_batch_size": 12,
            "micro_batch_size": 12,
            "micro_batch_tokens": BUDGET,
        },
        evaluation={"every": None},
        checkpoint={"every": None},
    )
    # Ranks divide a step into other micro-batches, and dropout draws for micro-batches.
    file = path.parent / "model" / "config.json"
    config = json.loads(file.read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    file.write_text(json.dumps(config))
    return path


def curve(run: Path) -> list[float]:
    """Return loss and gradient norm of each step, and what the last weights score."""
    found: list[float] = []
    for event in events(run):
        if event["event"] == "step":
            found += [event["loss"], event["grad_norm"]]
        elif event["event"] == "eval":
            found.append(event["metrics"]["loss"])
    assert len(found) == 2 * STEPS + 3
    return found


def test_every_stage_follows_the_reference(recipe: Path) -> None:
    run = recipe.parent / "runs"
    train(recipe, ["name=reference", "engine.type=reference"], world_size=1)
    expected = curve(run / "reference")
    for stage in (0, 1, 2, 3):
        train(recipe, [f"name=stage{stage}", f"engine.zero_stage={stage}"], world_size=2)
        # The same sums in another order.
        assert curve(run / f"stage{stage}") == pytest.approx(expected, rel=2e-4), stage


def test_micro_batches_stay_within_the_budget(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    tokenizer = load_tokenizer(model_source(loaded.model))
    tasks = prepare_tasks(loaded, tokenizer=tokenizer, say=lambda _: None)
    mixture = plan_steps(loaded, tasks).mixture
    numbers = []
    for step in range(STEPS):
        ranks = [
            make_loader(
                loaded, tasks, tokenizer=tokenizer, mixture=mixture, rank=rank, world_size=2
            ).batch(step)
            for rank in range(2)
        ]
        assert len(ranks[0].micro_batches) == len(ranks[1].micro_batches)
        numbers.append(len(ranks[0].micro_batches))
        for micro in (m for rank in ranks for m in rank.micro_batches):
            assert micro.inputs["input_ids"].numel() <= BUDGET
            assert micro.loss_weight == 1
    assert len(set(numbers)) > 1
    assert min(numbers) > 1
    with pytest.raises(ValueError, match=r"micro_batch_tokens: task \w+ has a row of \d+ tokens"):
        make_loader(
            load_recipe(recipe, overrides=["train.micro_batch_tokens=8"]),
            tasks,
            tokenizer=tokenizer,
            mixture=mixture,
        )
