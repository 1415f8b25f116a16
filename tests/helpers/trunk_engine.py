"""An engine whose model runs through its trunk, from a cached prefix on if wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_ft.engine.base import EngineOptions
from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
from dist_ft.engine.ds_config import DeepSpeedOptions
from dist_ft.engine.layer_modes import LayerModes
from dist_ft.engine.loss_module import LossModule
from dist_ft.engine.trunk_passes import TrunkPasses
from dist_ft.freezing.activation_cache import ActivationCache, CachedTask
from dist_ft.model.backbone import MultiTaskModel
from dist_ft.model.layer_groups import LayerGroup
from dist_ft.model.trunk import Trunk
from dist_ft.optim.param_groups import LearningRates, build_param_groups


def trunk_engine(
    model: MultiTaskModel,
    *,
    groups: Sequence[LayerGroup],
    trunk: Trunk,
    loss: Callable[[Any, Any], Any],
    stage: int,
    rate: float,
    weight_decay: float = 0.0,
    cache: tuple[Path, np.ndarray] | None = None,
) -> DeepSpeedEngine:
    """Return an engine for the task "a" with micro-batches of three rows.

    Args:
        model: Its model.
        groups: The model's layer groups.
        trunk: Its trunk.
        loss: Of the task.
        stage: Of ZeRO.
        rate: The learning rate.
        weight_decay: Of all groups.
        cache: Folder, and the length of each row; the prefix may leave. None keeps nothing.
    """
    passes = TrunkPasses(
        trunk=trunk,
        order=tuple(g.name for g in groups if g.kind != "head"),
        parameters={g.name: g.parameters for g in groups},
    )
    if cache is not None:
        folder, lengths = cache
        tasks = {"a": CachedTask(lengths)}
        passes.cache = ActivationCache(folder, tasks, trunk.width, torch.float32, 10**6)
        passes.drop_prefix = True
    return DeepSpeedEngine(
        LossModule(model, {"a": loss}),
        param_groups=build_param_groups(
            groups,
            dimensions={n: p.dim() for n, p in model.named_parameters()},
            rates=LearningRates(rate),
            weight_decay=weight_decay,
        ),
        options=EngineOptions(seed=1),
        deepspeed_options=DeepSpeedOptions(
            zero_stage=stage, micro_batch_size=3, gradient_accumulation_steps=1
        ),
        modes=LayerModes.of(
            model, groups=groups, checkpointing="none", prefix_dropout=False, passes=passes
        ),
    )
