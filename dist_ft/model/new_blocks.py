"""Blocks that start from random weights although the model is pre-trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dist_ft.model.backbone import MultiTaskModel
from dist_ft.model.layer_groups import LayerGroup
from dist_ft.model.stacks import group_modules


@torch.no_grad()
def reinitialize_top(
    model: MultiTaskModel, *, groups: Sequence[LayerGroup], blocks: int, seed: int
) -> tuple[str, ...]:
    """Give the top `blocks` blocks new random weights; return their layer groups.

    The upper layers of a pre-trained encoder are specialised in its pre-training task; on small
    data a fresh start of a few of them is more stable (Zhang et al. 2021, "Revisiting Few-sample
    BERT Fine-tuning", section 5). The weights are drawn as the model's class draws them, a
    function of `seed`; torch's global random state is left as it was.

    Raises:
        ValueError: If the model has fewer blocks, or no rule of its own for new weights.
    """
    backbone: Any = model.backbone
    found = [g for g in groups if g.kind == "block"]
    if blocks > len(found):
        raise ValueError(
            f"regularization.reinitialize_blocks: {blocks} is more than the model's {len(found)} "
            "blocks: lower it"
        )
    draw = getattr(backbone, "_init_weights", None)
    if draw is None:
        raise ValueError(
            f"regularization.reinitialize_blocks: {type(backbone).__name__} does not say how its "
            "weights are drawn: remove it"
        )
    chosen = found[-blocks:]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for top in (m for g in chosen for m in group_modules(model, g.parameters)):
            for parameter in top.parameters():
                vars(parameter).pop("_is_hf_initialized", None)
            for module in top.modules():
                draw(module)
    return tuple(g.name for g in chosen)
