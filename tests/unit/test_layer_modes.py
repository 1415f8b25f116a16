"""Modes of layers in training."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from dist_ft.engine.layer_modes import LayerModes
from dist_ft.model.backbone import HeadSpec, build_model
from tests.helpers.tiny_models import OTHERS


def test_batch_normalisation_keeps_its_statistics_in_training() -> None:
    values: Any = OTHERS["hubert"][1] | {"conv_pos_batch_norm": True}
    heads = [HeadSpec("a", "AutoModelForAudioClassification", {"num_labels": 3})]
    config = transformers.AutoConfig.for_model("hubert", **values)
    model = build_model(config, heads=heads, dtype=torch.float32, seed=0)
    before = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
    assert len(before) == 2
    LayerModes.none().enter_train(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    assert model.training
    assert not any(m.training for m in norms)
    model("a", {"input_values": torch.randn(2, 400)}).logits.sum().backward()
    assert all(m.weight.grad is not None and m.weight.grad.any() for m in norms)  # it trains
    after = dict(model.named_buffers())
    assert all(torch.equal(after[name], b) for name, b in before.items())
