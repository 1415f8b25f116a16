"""Losses and gradients that are not finite: no rank updates, and the run goes on or goes back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_ft.engine.base import EngineOptions
from dist_ft.engine.loss_module import LossModule
from dist_ft.recipe import load_recipe
from dist_ft.train import build
from dist_ft.train.checkpoint import CheckpointReader
from dist_ft.train.numbers import BadNumbersError
from tests.helpers.phases import ALL, bitwise_equal, make_deepspeed, make_reference
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny import TASKS, TinyModel, global_batch, learning_rates, param_groups
from tests.helpers.tiny_run import events, newest_checkpoint, write_recipe

NAN = float("nan")
# Of six steps, what goes wrong in them, on one rank.
FAULTS = {1: "loss", 2: "gradient", 4: "limit"}


def _poison(engine: Any, kind: str) -> Callable[[], None]:
    """Spoil the loss of this rank's next forward; return what takes that back."""
    module = engine.module
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        loss, outputs = original(*args, **kwargs)
        if kind == "loss":
            return loss * NAN, outputs
        loss.register_hook(lambda gradient: gradient * NAN)
        return loss, outputs

    module.forward = forward

    def restore() -> None:
        module.forward = original

    return restore


def _steps(engine: Any, *, faults: dict[int, str], share: tuple[int, int]) -> list[str | None]:
    rank, world = share
    groups = param_groups(TinyModel())
    refused: list[str | None] = []
    for step in range(6):
        if step in FAULTS and not faults:
            continue  # the oracle never has this step
        batches = global_batch(step, micro_batches=2)
        fault = faults.get(step)
        restore = None
        if fault in ("loss", "gradient") and rank == world - 1:
            restore = _poison(engine, fault)
        result = engine.train_step(
            step,
            task=TASKS[step % len(TASKS)],
            micro_batches=batches[rank::world],
            global_count=sum(len(b.targets["y"]) for b in batches),
            learning_rates=learning_rates(groups, step),
            loss_limit=1e-9 if fault == "limit" else float("inf"),
        )
        if restore is not None:
            restore()
        refused.append(result.refused)
    return refused


def _leaves_out(stage: int) -> None:
    for precision in ("fp32", "bf16"):
        _leaves_out_in(precision, stage)


def _leaves_out_in(precision: Any, stage: int) -> None:
    share = dist.get_rank(), dist.get_world_size()
    ends: list[dict[str, Tensor]] = []
    for faults in (FAULTS, {}):
        engine = make_deepspeed(EngineOptions(precision=precision), zero_stage=stage)
        engine.set_trainable(ALL)
        refused = _steps(engine, faults=faults, share=share)
        if faults:
            told = [why is not None for why in refused]
            assert told == [step in FAULTS for step in range(6)]
            assert refused[2] == "the gradient is not finite"
            assert "above" in str(refused[4])
        ends.append(engine.full_weights())
    if dist.get_rank() == 0:
        assert bitwise_equal(*ends)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_bad_step_is_as_if_it_had_never_been(stage: int) -> None:
    run_distributed(_leaves_out, stage)


def test_a_bad_step_is_left_out_by_the_reference_engine() -> None:
    ends: list[dict[str, Tensor]] = []
    for faults in (FAULTS, {}):
        engine = make_reference(EngineOptions())
        engine.set_trainable(ALL)
        _steps(engine, faults=faults, share=(0, 1))
        ends.append(engine.full_weights())
    assert bitwise_equal(*ends)


def _poisoned_run(recipe: Path, first: int, last: int, names: tuple[str, ...]) -> None:
    """Train with a NaN in rank 1's part of the steps from `first` to `last`."""
    calls = [0]
    original = LossModule.forward

    def forward(self: LossModule, *args: Any, **kwargs: Any) -> Any:
        loss, outputs = original(self, *args, **kwargs)
        if torch.is_grad_enabled():
            calls[0] += 1
            if os.environ["RANK"] == "1" and first < calls[0] <= last:
                return loss * NAN, outputs
        return loss, outputs

    LossModule.forward = forward
    assert build.train(load_recipe(recipe, overrides=names), resume=False) == 0


def test_one_row_on_one_rank_is_left_out_and_recorded(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train={"max_duration": "8step"})
    run_distributed(_poisoned_run, recipe, 5, 6, ())
    found = events(tmp_path / "runs/tiny")
    (bad,) = [e for e in found if e["event"] == "bad_numbers"]
    assert (bad["step"], bad["in_a_row"]) == (6, 1)
    assert bad["loss_by_rank"][1] == "nan"
    assert bad["loss_by_rank"][0] != "nan"
    assert len(bad["rows"]) == 8
    assert 6 not in [e["step"] for e in found if e["event"] == "step"]
    assert found[-1] == {**found[-1], "event": "end", "step": 8}


def test_three_in_a_row_take_the_run_back_to_its_checkpoint(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "train": {"max_duration": "12step"},
        # An interval ends among the bad steps: its weights are in doubt, so it has no checkpoint.
        "checkpoint": {"every": "2step", "keep_last": 9},
    }
    recipe = write_recipe(tmp_path, **changes)
    run_distributed(_poisoned_run, recipe, 5, 11, ("freezing={policy: none}",))
    found = events(tmp_path / "runs/tiny")
    back = [(e["step"], e["to_step"]) for e in found if e["event"] == "roll_back"]
    # Without a good step since, the second one goes behind the checkpoint that did not help.
    assert back == [(8, 4), (11, 2)]
    saved = [e["step"] for e in found if e["event"] == "checkpoint"]
    assert saved == [2, 4, 8, 11, 12]
    checkpoints = tmp_path / "runs/tiny/checkpoints"
    at_4, at_8 = (CheckpointReader(checkpoints / f"step-0000000{n}") for n in (4, 8))
    assert at_8.trainer["progress"]["step"] == 8
    assert at_8.trainer["progress"]["dropped"] == [[4, 8]]
    # Step 5 was good but is given up, too: weights and moments are those of step 4.
    for name in ("weight", "exp_avg"):
        parameter = "backbone.embeddings.word_embeddings.weight"
        count = at_4.numel(parameter)
        one, other = (r.read(name, parameter, start=0, length=count) for r in (at_4, at_8))
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    assert newest_checkpoint(tmp_path / "runs/tiny").name == "step-00000012"


def _hopeless(recipe: Path) -> None:
    with pytest.raises(BadNumbersError, match="there is no checkpoint to go back to"):
        _poisoned_run(recipe, 0, 99, ())


def test_a_run_that_only_has_bad_numbers_ends_and_saves_nothing(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run_distributed(_hopeless, recipe)
    assert not list((tmp_path / "runs/tiny").glob("checkpoints/step-*"))
