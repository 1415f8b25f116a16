"""Makes the engine that a recipe asks for."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from dist_ft.config import Recipe
from dist_ft.engine.base import Engine, EngineOptions
from dist_ft.engine.ds_config import DeepSpeedOptions
from dist_ft.engine.layer_modes import LayerModes
from dist_ft.engine.loss_module import LossModule
from dist_ft.engine.reference import ReferenceEngine
from dist_ft.engine.trunk_passes import TrunkPasses
from dist_ft.optim.param_groups import ParamGroup
from dist_ft.train.parts import Parts
from dist_ft.train.regularization import averaging


def make_engine(
    recipe: Recipe,
    parts: Parts,
    *,
    module: LossModule,
    param_groups: Sequence[ParamGroup],
    passes: TrunkPasses,
) -> Engine:
    """Return the engine that the recipe asks for."""
    options = EngineOptions(
        precision=recipe.engine.precision,
        max_grad_norm=recipe.optim.max_grad_norm,
        betas=recipe.optim.betas,
        eps=recipe.optim.eps,
        seed=recipe.seed,
        returning=recipe.freezing.returning,
        averaging=averaging(recipe, to_steps=parts.lengths.steps),
        watch_shared=recipe.balancing.policy == "gradnorm",
    )
    modes = LayerModes.of(
        parts.model,
        groups=parts.groups,
        checkpointing=recipe.model.activation_checkpointing,
        # Kept activations can't draw anew; without them the recipe's word counts.
        prefix_dropout=recipe.freezing.prefix_dropout is not False and passes.cache is None,
        passes=passes,
    )
    if recipe.engine.type == "reference":
        return ReferenceEngine(module, param_groups=param_groups, options=options, modes=modes)
    # Imported here: it takes seconds, and the reference engine does without.
    from dist_ft.engine.deepspeed_engine import DeepSpeedEngine

    world_size = torch.distributed.get_world_size()
    size = recipe.train.micro_batch_size
    if recipe.train.micro_batch_tokens is not None:
        # Micro-batches differ in rows, and steps in micro-batches: the engine itself says which is
        # a step's last, and DeepSpeed only wants numbers.
        size = min(size, recipe.train.global_batch_size // world_size)
    base = recipe.engine.deepspeed
    switch = recipe.freezing.switch
    engine = DeepSpeedEngine(
        module,
        param_groups=param_groups,
        options=options,
        deepspeed_options=DeepSpeedOptions(
            zero_stage=recipe.engine.zero_stage,
            micro_batch_size=size,
            gradient_accumulation_steps=parts.turns
            * max(1, recipe.train.global_batch_size // (size * world_size)),
            offload_optimizer=recipe.engine.offload_optimizer,
            base=None if base is None else json.loads(base.read_text()),
        ),
        switch=parts.policy.suits() if switch == "auto" else switch,
        modes=modes,
    )
    engine.limit_universe(parts.policy.universe())
    return engine
