"""A phase change in every architecture trains the named groups, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_ft.engine.base import EngineOptions
from dist_ft.engine.loss_module import LossModule
from dist_ft.engine.reference import ReferenceEngine
from dist_ft.freezing.schedule import LayerOrder
from dist_ft.model.layer_groups import LayerGroup, find_layer_groups
from dist_ft.optim.param_groups import LearningRates, build_param_groups
from dist_ft.tasks.base import LossSum
from tests.helpers.phases import clone
from tests.helpers.tiny import TinyBatch
from tests.unit.test_layer_groups import ARCHITECTURES, build, inputs_for


def _loss(outputs: Any, targets: Any) -> LossSum:
    del targets
    logits = outputs.logits.float()
    weights = torch.linspace(-1.0, 1.0, logits.numel()).view_as(logits)
    return LossSum((logits * weights).sum() + logits.square().sum(), torch.tensor(1))


def _moved(before: dict[str, Any], after: dict[str, Any], group: LayerGroup) -> list[str]:
    return [n for n in group.parameters if not torch.equal(before[n], after[n])]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_phase_change_trains_exactly_the_named_groups(name: str) -> None:
    model = build(name)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "layerdrop"):
            config.layerdrop = 0.0  # speech models skip random layers in training
    groups = find_layer_groups(model)
    order = LayerOrder.of([(g.name, g.kind) for g in groups])
    engine = ReferenceEngine(
        LossModule(model, dict.fromkeys(model.tasks, _loss)),
        param_groups=build_param_groups(
            groups,
            dimensions={n: p.dim() for n, p in model.named_parameters()},
            rates=LearningRates(1e-2),
            weight_decay=0.1,
        ),
        options=EngineOptions(),
    )
    engine.set_trainable(order.everything)
    # The second phase has a hole: the lowest block and the heads, not what lies between.
    for step, trainable in enumerate((order.everything, (*order.blocks[:1], *order.heads))):
        engine.set_trainable(trainable)
        for task in model.tasks:
            before = clone(engine.full_weights())
            batch = TinyBatch(inputs_for(model, task), {}, index=0)
            rates = dict.fromkeys([g.name for g in groups], 1e-2)
            engine.train_step(
                step, task=task, micro_batches=[batch], global_count=1, learning_rates=rates
            )
            after = engine.full_weights()
            for group in groups:
                moved = _moved(before, after, group)
                if group.name in trainable and task in group.tasks:
                    assert moved, (name, task, group.name, "does not train")
                else:
                    assert not moved, (name, task, group.name, moved)
