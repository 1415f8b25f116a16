"""Noise on a model's word embeddings while it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from dist_ft.model.backbone import MultiTaskModel
from dist_ft.model.word_embeddings import WordEmbeddings, tokens_of


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
        self.alpha = alpha
        self._words = WordEmbeddings(model, key="neftune_alpha")

    @contextmanager
    def active(self, inputs: Mapping[str, Tensor]) -> Iterator[None]:
        """Add noise in forwards of `inputs` inside the context."""
        lengths = tokens_of(inputs).sum(1)

        def add(output: Tensor) -> Tensor:
            size = self.alpha / (lengths * output.shape[-1]).sqrt()
            noise = torch.empty(output.shape, dtype=torch.float32, device=output.device)
            return output + (noise.uniform_(-1, 1) * size[:, None, None]).to(output.dtype)

        with self._words.changed(add):
            yield
