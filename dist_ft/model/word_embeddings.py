"""Changes to what a model's word embeddings return, while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_ft.model.backbone import MultiTaskModel

Change = Callable[[Tensor], Tensor]


class WordEmbeddings:
    """The word embeddings of a model, whose output can be changed inside a context."""

    def __init__(self, model: MultiTaskModel, *, key: str) -> None:
        """Hook the word embeddings of `model`; nothing happens outside `changed`.

        Args:
            model: The model.
            key: The recipe's key that asks for it, for the error.

        Raises:
            ValueError: If the model has no word embeddings of its own, or a decoder shares them.
        """
        backbone: Any = model.backbone
        find = getattr(backbone, "get_input_embeddings", None)
        embedding = None if find is None else find()
        if backbone.config.is_encoder_decoder or not isinstance(embedding, nn.Module):
            raise ValueError(
                f"regularization.{key}: {type(backbone).__name__} has no word embeddings "
                "that only its input goes through: remove it, or use an encoder or a decoder"
            )
        self._changes: list[Change] = []
        embedding.register_forward_hook(self._apply)

    @contextmanager
    def changed(self, change: Change) -> Iterator[None]:
        """Let forwards inside the context see `change` of the embeddings [rows, length, width]."""
        self._changes.append(change)
        try:
            yield
        finally:
            self._changes.pop()

    def _apply(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        del module, args
        if not self._changes:
            return None
        for change in self._changes:
            output = change(output)
        return output


def tokens_of(inputs: Mapping[str, Tensor]) -> Tensor:
    """Return which positions hold tokens, not padding: bool [rows, length]."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]).bool() if mask is None else mask.bool()
