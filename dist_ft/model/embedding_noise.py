"""Noise on a model's word embeddings while it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_ft.model.backbone import MultiTaskModel


class EmbeddingNoise:
    """NEFTune (Jain et al. 2023): uniform noise of size alpha / sqrt(tokens * width).

    A row's own tokens count, not its padding. The draws come from torch's generator, which the
    engine seeds with (seed, step, micro-batch).
    """

    def __init__(self, model: MultiTaskModel, *, alpha: float) -> None:
        """Hook the word embeddings of `model`; nothing happens outside `active`.

        Raises:
            ValueError: If the model has no word embeddings of its own, or a decoder shares them.
        """
        backbone: Any = model.backbone
        find = getattr(backbone, "get_input_embeddings", None)
        embedding = None if find is None else find()
        if backbone.config.is_encoder_decoder or not isinstance(embedding, nn.Module):
            raise ValueError(
                f"regularization.neftune_alpha: {type(backbone).__name__} has no word embeddings "
                "that only its input goes through: remove it, or use an encoder or a decoder"
            )
        self.alpha = alpha
        self._lengths: Tensor | None = None
        embedding.register_forward_hook(self._add)

    @contextmanager
    def active(self, inputs: Mapping[str, Tensor]) -> Iterator[None]:
        """Add noise in forwards of `inputs` inside the context."""
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
        self._lengths = mask.sum(1)
        try:
            yield
        finally:
            self._lengths = None

    def _add(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        del module, args
        if self._lengths is None:
            return None
        size = self.alpha / (self._lengths * output.shape[-1]).sqrt()
        noise = torch.empty(output.shape, dtype=torch.float32, device=output.device)
        return output + (noise.uniform_(-1, 1) * size[:, None, None]).to(output.dtype)
