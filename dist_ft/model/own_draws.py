"""What some models do in training that neither the seed nor the recipe decides; turned off here."""

from __future__ import annotations

import copy
import logging
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

# Layer drop (Fan et al. 2020) leaves out blocks by a draw of each rank's own: another set of
# parameters on each, which partitioned weights can't follow. SpecAugment (Park et al. 2019) draws
# from numpy's global generator, which no step seeds: a resumed run would draw anew.
_OFF: dict[str, Any] = {
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "apply_spec_augment": False,
}


def without_own_draws(config: PreTrainedConfig) -> PreTrainedConfig:
    """Returns the configuration with layer drop and SpecAugment off, saying what was on."""
    on = [key for key, off in _OFF.items() if getattr(config, key, off) not in (off, None)]
    if on:
        logger.warning("off, as ranks and resumed runs would draw differently: %s", ", ".join(on))
        config = copy.deepcopy(config)
        for key in on:
            setattr(config, key, _OFF[key])
    return config


def let_inputs_be(model: nn.Module) -> None:
    """Keeps a model of waveforms from asking for the gradient of its input.

    It does so for the sake of re-entrant checkpoints in its first layers; through it autograd
    would record all of a frozen prefix.
    """
    for module in model.modules():
        if getattr(module, "_requires_grad", False) is True:
            module._requires_grad = False  # type: ignore[assignment]
