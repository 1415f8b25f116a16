"""Recomputed activations give the same gradients above a frozen prefix, in both torch modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_ft.engine.base import EngineOptions
from dist_ft.engine.layer_modes import LayerModes
from dist_ft.engine.loss_module import LossModule
from dist_ft.engine.reference import ReferenceEngine
from dist_ft.engine.trunk_passes import TrunkPasses
from dist_ft.freezing.schedule import LayerOrder
from dist_ft.model.backbone import HeadSpec, build_model
from dist_ft.model.layer_groups import find_layer_groups
from dist_ft.optim.param_groups import LearningRates, build_param_groups
from dist_ft.tasks.base import LossSum
from tests.helpers.phases import bitwise_equal
from tests.helpers.tiny import TinyBatch
from tests.helpers.tiny_models import tiny_config


def _loss(outputs: Any, targets: Any) -> LossSum:
    losses = torch.nn.functional.cross_entropy(outputs.logits, targets["labels"], reduction="none")
    return LossSum(losses.sum(), torch.tensor(len(losses)))


def _batch(step: int) -> TinyBatch:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 64, (4, 9), generator=generator)
    return TinyBatch(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        {"labels": torch.randint(2, (4,), generator=generator)},
        index=0,
    )


def _train(architecture: str, checkpointing: Any, recomputed: list[int]) -> dict[str, Any]:
    config = tiny_config(architecture)
    config.pad_token_id = 0
    heads = [HeadSpec("a", "AutoModelForSequenceClassification", {"num_labels": 2})]
    model = build_model(config, heads=heads, dtype=torch.float32, seed=0)
    groups = find_layer_groups(model)
    engine = ReferenceEngine(
        LossModule(model, {"a": _loss}),
        param_groups=build_param_groups(
            groups,
            dimensions={n: p.dim() for n, p in model.named_parameters()},
            rates=LearningRates(1e-2),
            weight_decay=0.1,
        ),
        options=EngineOptions(seed=1),
        modes=LayerModes.of(
            model,
            groups=groups,
            checkpointing=checkpointing,
            prefix_dropout=True,
            passes=TrunkPasses(),
        ),
    )
    order = LayerOrder.of([(g.name, g.kind) for g in groups])
    rates = dict.fromkeys(order.everything, 1e-2)
    for step in range(9):
        if step % 3 == 0:  # a frozen prefix, everything, a hole in the middle
            engine.set_trainable(
                [order.above(2), order.everything, (*order.blocks[:1], *order.above(3))][step // 3]
            )
            recomputed.append(
                sum(bool(getattr(m, "gradient_checkpointing", False)) for m in model.modules())
            )
        engine.train_step(
            step, task="a", micro_batches=[_batch(step)], global_count=4, learning_rates=rates
        )
    return engine.full_weights()


@pytest.mark.parametrize("mode", ["reentrant", "non_reentrant"])
@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2"])
def test_recomputation_changes_no_bit(architecture: str, mode: str) -> None:
    plain_counts: list[int] = []
    counts: list[int] = []
    plain = _train(architecture, "none", plain_counts)
    assert bitwise_equal(_train(architecture, mode, counts), plain)
    assert plain_counts == [0, 0, 0]
    assert counts[1] >= 2  # with everything trainable, blocks do recompute
    assert counts[0] < counts[1]  # a frozen prefix does not
