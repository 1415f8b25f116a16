"""Puts a checkpoint's weights into a model."""

from __future__ import annotations

import torch

from dist_ft.model.backbone import MultiTaskModel
from dist_ft.train.checkpoint import CheckpointReader


@torch.no_grad()
def load_weights(model: MultiTaskModel, reader: CheckpointReader) -> None:
    """Put a checkpoint's weights into a whole model, in the precision that was trained.

    A parameter that an average is kept of gets the average: it was scored in training, too.

    Raises:
        ValueError: If the checkpoint lacks a parameter.
    """
    for name, parameter in model.named_parameters():
        weight = reader.read("weight", name, start=0, length=parameter.numel())
        if weight is None:
            raise ValueError(f"{reader.folder} has no weights for {name}: it is another model's")
        average = reader.read("average", name, start=0, length=parameter.numel())
        chosen = weight if average is None else average.to(weight.dtype)
        parameter.data = chosen.view(parameter.shape).clone()
