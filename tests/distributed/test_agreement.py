"""Ranks that would do different things say so by name, all of them, within the step."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dist_ft.freezing.policies import ScheduledPolicy
from dist_ft.freezing.schedule import Phase
from dist_ft.kernels import ops
from dist_ft.recipe import load_recipe
from dist_ft.train import build
from dist_ft.train.agreement import DisagreementError, StepPlan, agree
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny_run import events, write_recipe

PLAN = StepPlan(7, "a", 2, 1, ("block.3", "head.a"), ("block.3", "head.a"))


def _largest_signal() -> None:
    assert agree(PLAN, stop=0) == 0
    assert agree(PLAN, stop=15 if dist.get_rank() == 2 else 0) == 15


def test_equal_plans_pass_and_a_signal_reaches_everybody() -> None:
    run_distributed(_largest_signal, world_size=3)


def _names_the_rank(change: dict[str, Any], expected: str) -> None:
    mine = replace(PLAN, **change) if dist.get_rank() == 1 else PLAN
    with pytest.raises(DisagreementError, match=expected):
        agree(mine, stop=0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"trainable": ("head.a",)}, r"step 7: rank 1 would train all but block\.3"),
        ({"trainable": ("block.2", "block.3", "head.a")}, r"rank 1 would train block\.2"),
        ({"trainable_before": ("head.a",)}, r"rank 1 trains all but block\.3"),
        ({"task": "b"}, r"rank 1 runs task b, others a"),
        ({"micro_batches": 3}, r"rank 1 has 3 micro-batches, others 2"),
        ({"phase": 2}, r"rank 1 is in phase 2, others in 1"),
    ],
)
def test_a_difference_is_named(change: dict[str, Any], expected: str) -> None:
    run_distributed(_names_the_rank, change, expected, world_size=3)


def _planted(path: Path, kind: str) -> None:
    recipe = load_recipe(path)
    if os.environ["RANK"] == "1":
        _plant(kind)
    began = time.monotonic()
    with pytest.raises(DisagreementError, match=r"step 9: .*rank 1.*block\.0"):
        build.train(recipe, resume=False)
    assert time.monotonic() - began < 60


def _plant(kind: str) -> None:
    original, built = ScheduledPolicy.phase_at, []

    class Remembered(build.LossModule):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            built.append(self)

    def other_phase(self: ScheduledPolicy, step: int) -> Phase:
        phase = original(self, step)
        return replace(phase, trainable=("block.0", *phase.trainable)) if step >= 9 else phase

    def other_parameters(self: ScheduledPolicy, step: int) -> Phase:
        # The policy agrees, the parameters don't: someone thawed a block behind its back.
        if step == 9:
            for name, parameter in built[0].named_parameters():
                if ".layer.0." in name:
                    parameter.requires_grad_(requires_grad=True)
        return original(self, step)

    build.LossModule = Remembered
    ScheduledPolicy.phase_at = other_phase if kind == "policy" else other_parameters


@pytest.mark.parametrize("kind", ["policy", "parameters"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_planted_disagreement_stops_all_ranks(kind: str, stage: int, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, engine={"zero_stage": stage})
    run_distributed(_planted, recipe, kind)
    assert all(e["step"] <= 9 for e in events(tmp_path / "runs/tiny"))


def _self_test_fails_on_rank_1(path: Path) -> None:
    if os.environ["RANK"] == "1":
        ops.test = lambda *_, **__: "its self-test failed: wrong numbers"
    expected = r"rank 1 on .* has dropout reference, not by_byte.*kernels: reference"
    with pytest.raises(ValueError, match=expected):
        build.train(load_recipe(path), resume=False)


def test_ranks_that_would_run_other_kernels_say_so(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    run_distributed(_self_test_fails_on_rank_1, path, world_size=2)
