"""Several tasks in one optimizer step, and balanced losses, under ZeRO 0-3 beside plain torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ft.engine.base import EngineOptions
from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
from dist_ft.engine.ds_config import DeepSpeedOptions
from dist_ft.engine.reference import ReferenceEngine
from dist_ft.engine.turns import OwnTurn
from dist_ft.optim.balancing import (
    Balancer,
    DynamicWeightAverage,
    Famo,
    GradNorm,
    UncertaintyWeights,
)
from dist_ft.train.balancing import observations
from tests.helpers.phases import ALL, largest_difference, mean_difference
from tests.helpers.plain_balancing import train_plain
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny import (
    TASKS,
    TinyBatch,
    TinyModel,
    global_batch,
    learning_rates,
    param_groups,
)
from tests.helpers.tiny_run import events, state_hash, train, write_recipe

STEPS = 20
SCHEDULE = {0: ("block.3", "head.a", "head.b"), 6: ALL, 12: ("block.1", "block.3", "head.a")}
POLICIES = ("uncertainty", "dwa", "gradnorm", "famo")


class Weighed(nn.Module):
    """The tiny model whose losses weigh something in training."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.model = TinyModel()
        self._weights = weights

    def forward(self, task: str, inputs: Any, targets: Any) -> tuple[Tensor, Any]:
        loss, outputs = self.model(task, inputs, targets)
        return loss * (self._weights[task] if self.training else 1.0), outputs


def _turns(step: int, task: str) -> list[TinyBatch]:
    """Two micro-batches of a task; of b the targets are larger, so that the losses differ."""
    batches = global_batch(2 * step + TASKS.index(task), micro_batches=2)
    for batch in batches if task == "b" else ():
        batch.targets["y"] *= 3
        batch.index += 2
    return batches


def _balancer(policy: str) -> Balancer:
    if policy == "uncertainty":
        return UncertaintyWeights(TASKS, lr=0.05)
    if policy == "dwa":
        return DynamicWeightAverage(TASKS, every=4, temperature=0.5)
    if policy == "gradnorm":
        return GradNorm(TASKS, lr=0.05, alpha=1.5)
    return Famo(TASKS, lr=0.1, decay=0.01)


def _run(policy: str, *, stage: int | None, share: tuple[int, int], precision: Any = "fp32") -> Any:
    balancer = _balancer(policy)
    weights: dict[str, float] = dict.fromkeys(map(str, TASKS), 1.0)
    module: Any = Weighed(weights)
    groups = param_groups(module.model)
    options = EngineOptions(
        max_grad_norm=0.0, watch_shared=policy == "gradnorm", precision=precision
    )
    engine: Any
    if stage is None:
        engine = ReferenceEngine(module, param_groups=groups, options=options)
    else:
        deepspeed = DeepSpeedOptions(
            zero_stage=stage, micro_batch_size=4, gradient_accumulation_steps=2
        )
        engine = DeepSpeedEngine(
            module, param_groups=groups, options=options, deepspeed_options=deepspeed
        )
    history: list[list[float]] = []
    for step in range(STEPS):
        if step in SCHEDULE:
            engine.set_trainable(SCHEDULE[step])
        if step == 9:  # as a checkpoint would
            state, balancer = balancer.state_dict(), _balancer(policy)
            balancer.load_state_dict(state)
        weights.update(balancer.weights)
        history.append(list(weights.values()))
        turns = [OwnTurn(task, _turns(step, task)[share[0] :: share[1]], 8) for task in TASKS]
        result = engine.train_step(
            step,
            task=turns[0].task,
            micro_batches=turns[0].micro_batches,
            global_count=8,
            learning_rates=learning_rates(groups, step),
            joined=turns[1:],
        )
        batch: Any = SimpleNamespace(turns=turns)
        balancer.observe(observations(batch, result, weights=weights))
    return engine.full_weights(), history


def _close(history: list[list[float]], expected: list[list[float]], *, policy: str) -> None:
    difference = (torch.tensor(history) - torch.tensor(expected)).abs().max()
    assert difference <= 1e-4, (policy, float(difference))
    assert torch.tensor(expected).std(0).min() > 1e-2, policy  # they do move


def _follows(expected: dict[str, Any]) -> None:
    for policy, (weights, history) in expected.items():
        for stage in range(4):
            share = (dist.get_rank(), dist.get_world_size())
            found, own = _run(policy, stage=stage, share=share)
            _close(own, history, policy=policy)
            if dist.get_rank() == 0:
                assert largest_difference(found, weights) <= 1e-5, (policy, stage)


def test_balanced_joint_steps_equal_plain_torch() -> None:
    groups = param_groups(TinyModel())
    expected = {p: train_plain(p, groups, SCHEDULE, steps=STEPS, turns=_turns) for p in POLICIES}
    for policy, (weights, history) in expected.items():
        found, own = _run(policy, stage=None, share=(0, 1))
        _close(own, history, policy=policy)
        assert largest_difference(found, weights) <= 1e-5, policy
    run_distributed(_follows, expected)


def _bf16_follows(expected: dict[str, Any], equal: dict[str, Tensor]) -> None:
    share = (dist.get_rank(), dist.get_world_size())
    for stage, (policy, (weights, history)) in enumerate(expected.items()):
        found, own = _run(policy, stage=stage, share=share, precision="bf16")
        if dist.get_rank() == 0:
            off = (torch.tensor(own) - torch.tensor(history)).abs().max()
            # What is learnt follows losses and norms, which rounding moves by less than a percent.
            assert off < 1e-2, (policy, float(off))
            assert torch.tensor(history).std(0).min() > 0.1, policy
            # Gradients are rounded to bf16 after other sums; what balancing itself does is larger.
            error = mean_difference(found, weights)
            assert error < min(1e-3, mean_difference(equal, weights) / 2), (policy, error)


def test_balancers_follow_plain_torch_in_bf16() -> None:
    groups = param_groups(TinyModel())
    bf16: Any = {"steps": STEPS, "turns": _turns, "dtype": torch.bfloat16}
    expected = {p: train_plain(p, groups, SCHEDULE, **bf16) for p in POLICIES}
    equal, _ = train_plain("equal", groups, SCHEDULE, **bf16)
    run_distributed(_bf16_follows, expected, equal)


def test_a_joint_run_resumes_to_the_bit(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path,
        mixture={"policy": "round_robin", "tasks_per_step": 3},
        balancing={"policy": "gradnorm"},
        train={"max_duration": "6step"},
        evaluation={"every": "6step"},
        checkpoint={"every": "2step"},
        engine={"zero_stage": 3},
    )
    train(path, ["name=whole"])
    train(path, ["name=halves"], stop_at=3, exit_code=75)
    train(path, ["name=halves"], resume=True)
    runs = tmp_path / "runs"
    assert state_hash(runs / "whole") == state_hash(runs / "halves")
    whole = events(runs / "whole")
    steps = [e for e in whole if e["event"] == "step"]
    assert [sorted(e["task"] for e in steps if e["step"] == s) for s in range(1, 7)] == [
        ["spans", "tags", "text"]
    ] * 6
    weights = [e["weights"] for e in whole if e["event"] == "balance"]
    assert len(weights) == 6
    assert weights[0] != weights[-1]
    again = [e["weights"] for e in events(runs / "halves") if e["event"] == "balance"]
    assert again[-1] == weights[-1]
