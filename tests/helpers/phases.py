"""Runs a schedule of phases through an engine."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_ft.engine.base import Engine, EngineOptions
from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
from dist_ft.engine.ds_config import DeepSpeedOptions
from dist_ft.engine.reference import ReferenceEngine
from tests.helpers.tiny import TASKS, WIDTH, TinyModel, global_batch, learning_rates, param_groups

Schedule = Mapping[int, Sequence[str]]
ALL = ("embeddings", "block.0", "block.1", "block.2", "block.3", "head.a", "head.b")


def make_reference(options: EngineOptions, *, dropout: float = 0.0) -> ReferenceEngine:
    """Return the one-process engine over the tiny model."""
    model = TinyModel(dropout=dropout)
    return ReferenceEngine(model, param_groups=param_groups(model), options=options)


def make_deepspeed(
    options: EngineOptions, *, zero_stage: int, dropout: float = 0.0, **kwargs: Any
) -> DeepSpeedEngine:
    """Return a DeepSpeed engine over the tiny model."""
    model = TinyModel(dropout=dropout, width=kwargs.pop("width", WIDTH))
    return DeepSpeedEngine(
        model,
        param_groups=param_groups(model),
        options=options,
        deepspeed_options=DeepSpeedOptions(
            zero_stage=zero_stage,
            micro_batch_size=4,
            gradient_accumulation_steps=kwargs.pop("accumulation", 1),
            offload_optimizer=kwargs.pop("offload", False),
            base=kwargs.pop("base", None),
        ),
        **kwargs,
    )


def run(
    engine: Engine,
    schedule: Schedule,
    *,
    steps: range,
    micro_batches: int,
    share: tuple[int, int] = (0, 1),
    width: int = WIDTH,
    lr: float = 1e-2,
) -> list[float]:
    """Run `steps`, changing phase where the schedule says; return the gradient norms.

    `share` is (rank, world size): micro-batch j goes to rank j modulo the world size.
    """
    rank, world = share
    norms: list[float] = []
    groups = param_groups(TinyModel(width=width), lr=lr)
    for step in steps:
        if step in schedule:
            engine.set_trainable(schedule[step])
        batches = global_batch(step, micro_batches=micro_batches)
        result = engine.train_step(
            step,
            task=TASKS[step % len(TASKS)],
            micro_batches=batches[rank::world],
            global_count=sum(len(b.targets["y"]) for b in batches),
            learning_rates=learning_rates(groups, step),
        )
        norms.append(result.grad_norm or 0.0)
    return norms


def largest_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the largest absolute difference between two sets of weights."""
    assert one.keys() == other.keys()
    return max(float((one[n].float() - other[n].float()).abs().max()) for n in one)


def mean_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the mean absolute difference between two sets of weights."""
    assert one.keys() == other.keys()
    total = sum(float((one[n].float() - other[n].float()).abs().sum()) for n in one)
    return total / sum(value.numel() for value in one.values())


def clone(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of the weights."""
    return {n: w.detach().clone() for n, w in weights.items()}


def bitwise_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether two sets of weights are the same bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
