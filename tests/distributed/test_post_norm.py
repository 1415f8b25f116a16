"""The Triton kernels inside a model: ZeRO, activation checkpointing, dropout.

They run in Triton's interpreter, which is chosen when Triton is imported: in a program of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_ft.engine.base import EngineOptions
from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
from dist_ft.engine.ds_config import DeepSpeedOptions
from dist_ft.engine.layer_modes import Checkpointing, LayerModes
from dist_ft.engine.loss_module import LossModule
from dist_ft.engine.reference import ReferenceEngine
from dist_ft.engine.trunk_passes import TrunkPasses
from dist_ft.kernels.dropout_norm import WIDEST
from dist_ft.model.backbone import HeadSpec, build_model
from dist_ft.model.layer_groups import find_layer_groups
from dist_ft.model.post_norm import find_post_norms, fuse_post_norms
from dist_ft.optim.param_groups import LearningRates, build_param_groups
from dist_ft.tasks.base import LossSum
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny import TinyBatch
from tests.helpers.tiny_models import tiny_config

OPTIONS = EngineOptions(seed=3, eps=1e-5, max_grad_norm=1.0)


def _loss(outputs: Any, targets: Any) -> LossSum:
    return LossSum(
        torch.nn.functional.cross_entropy(outputs["logits"], targets["y"], reduction="sum"),
        torch.tensor(len(targets["y"])),
    )


def _train(
    stage: int | None,
    *,
    p: float,
    fused: bool = True,
    checkpointing: Checkpointing = "none",
    steps: int = 2,
) -> tuple[list[float], dict[str, Tensor], int]:
    """Losses and weights after steps, the second with the embeddings frozen, and calls."""
    from dist_ft.kernels import triton_dropout_norm as kernels

    config: Any = tiny_config("bert")
    config.num_hidden_layers = 2
    config.hidden_dropout_prob, config.attention_probs_dropout_prob = p, 0.0
    heads = [HeadSpec("a", "AutoModelForSequenceClassification", {})]
    model = build_model(config, heads=heads, dtype=torch.float32, seed=0)
    groups = find_layer_groups(model)
    calls: list[int] = []
    if fused:

        def counted(
            hidden: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, p: float, eps: float
        ) -> Tensor:
            calls.append(weight.numel())
            return kernels.dropout_residual_norm(hidden, residual, weight, bias, p=p, eps=eps)

        fuse_post_norms(find_post_norms(model, widest=WIDEST), by=counted)
    module = LossModule(model, {"a": _loss})
    modes = LayerModes.of(
        model,
        groups=groups,
        checkpointing=checkpointing,
        prefix_dropout=False,
        passes=TrunkPasses(),
    )
    param_groups = build_param_groups(
        groups,
        dimensions={n: p.dim() for n, p in model.named_parameters()},
        rates=LearningRates(1e-3),
        weight_decay=0.0,
    )
    rank, world = 0, 1
    if stage is None:
        engine: Any = ReferenceEngine(
            module, param_groups=param_groups, options=OPTIONS, modes=modes
        )
    else:
        engine = DeepSpeedEngine(
            module,
            param_groups=param_groups,
            options=OPTIONS,
            deepspeed_options=DeepSpeedOptions(stage, 2, 1),
            modes=modes,
        )
        rank, world = dist.get_rank(), dist.get_world_size()
    names = [g.layer_group for g in param_groups]
    losses: list[float] = []
    for step in range(steps):
        engine.set_trainable(n for n in names if step == 0 or n != "embeddings")
        result = engine.train_step(
            step,
            task="a",
            micro_batches=[_batch(step, index) for index in range(2)][rank::world],
            global_count=4,
            learning_rates=dict.fromkeys(names, 1e-3),
        )
        loss = result.loss.detach().clone()
        if stage is not None:
            dist.all_reduce(loss)
        losses.append(float(loss))
    weights = engine.full_weights()
    engine.close()
    assert all(calls), "weights were not gathered"
    return losses, weights, len(calls)


def _batch(step: int, index: int) -> TinyBatch:
    draw = torch.Generator().manual_seed(100 * step + index)
    ids = torch.randint(3, 60, (2, 5), generator=draw)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return TinyBatch(inputs, {"y": torch.randint(2, (2,), generator=draw)}, index)


def _same(one: Any, other: Any) -> None:
    for mine, theirs in zip(one[0], other[0], strict=True):
        assert abs(mine - theirs) <= 1e-5 * theirs, (one[0], other[0])
    for key, value in one[1].items():
        difference = float((value - other[1][key]).abs().max())
        # Steps of 1e-3: what Adam divides by 1e-5 and less is rounding.
        assert difference <= 1e-5, (key, difference)


def _compare() -> None:
    plain = _train(None, p=0.0, fused=False)
    _same(_train(3, p=0.0, checkpointing="non_reentrant"), plain)
    # Recomputed blocks must draw the mask of their forward again.
    dropped = _train(3, p=0.3, steps=1)
    again = _train(3, p=0.3, checkpointing="non_reentrant", steps=1)
    _same(again, dropped)
    assert again[2] > dropped[2] > 0  # blocks ran twice
    assert abs(dropped[0][0] - plain[0][0]) > 1e-4 * plain[0][0]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_fused_post_norms_train_like_plain_torch_under_zero() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __name__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    run_distributed(_compare)
