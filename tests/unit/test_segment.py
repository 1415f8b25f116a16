"""What a segment of a run comes to: the one score by which a search ranks."""

from __future__ import annotations

import math
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from dist_ft import dist
from dist_ft.config_evaluation import EvaluationConfig
from dist_ft.freezing.schedule import Phase
from dist_ft.recipe import load_recipe
from dist_ft.train.loop import enter_phase
from dist_ft.train.segment import Place, one_score, train_until
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny_run import write_recipe

FIRST, SECOND = {"a": 0.9, "b": 0.3}, {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (EvaluationConfig(decide_by="mean"), (0.6, 0.5)),
        (EvaluationConfig(decide_by="worst"), (0.3, 0.5)),
        (EvaluationConfig(decide_by="weighted", weights={"b": 3.0}), (0.45, 0.5)),
        (EvaluationConfig(), (0.6, 0.5)),
    ],
)
def test_runs_are_ranked_by_what_the_recipe_decides_by(
    config: EvaluationConfig, expected: tuple[float, float]
) -> None:
    found = one_score(FIRST, config), one_score(SECOND, config)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("by", ["each", "mean", "worst", "weighted"])
def test_a_score_that_is_no_number_is_none_in_any_order(by: str) -> None:
    config = EvaluationConfig.model_validate({"decide_by": by})
    for scores in ({"a": 0.5, "b": math.nan}, {"b": math.nan, "a": 0.5}):
        assert math.isnan(one_score(scores, config))


def _beats(path: Path) -> None:
    heartbeat = Mock()
    world = dist.World(rank=0, local_rank=0, world_size=1)
    place = Place(world, torch.device("cpu"), heartbeat=heartbeat)
    train_until(load_recipe(path), step=2, place=place)
    beats = [(c.args[0], c.kwargs["step"]) for c in heartbeat.beat.call_args_list]
    assert beats[0][0] == "start"
    assert ("step", 0) in beats
    assert ("step", 1) in beats
    assert beats[-1] == ("between runs", 0)
    # Comparing runs, or preparing the next one's data, takes as long as it takes.
    assert heartbeat.beat.call_args.kwargs["timeout_s"] == math.inf


def test_the_launcher_hears_of_the_runs_of_a_search(tmp_path: Path) -> None:
    run_distributed(_beats, write_recipe(tmp_path), world_size=1)


def test_a_phase_change_without_memory_says_what_helps() -> None:
    run, phase = Mock(), Phase(1, 5, ("head.a",))
    run.progress.step = 5
    run.engine.set_trainable.side_effect = torch.OutOfMemoryError("CUDA out of memory\nmore")
    with pytest.raises(RuntimeError, match=r"step 5: no memory .* phase 1 .*in_place") as caught:
        enter_phase(run, phase)
    assert not isinstance(caught.value, torch.OutOfMemoryError)  # or rows would be made fewer
