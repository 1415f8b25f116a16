"""Mixup of the hidden states of the rows of a micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_ft.model.backbone import MultiTaskModel
from dist_ft.model.layer_groups import LayerGroup
from dist_ft.model.stacks import group_modules
from dist_ft.model.word_embeddings import tokens_of


@dataclass(frozen=True)
class Mixture:
    """How rows are mixed in a micro-batch.

    Attributes:
        block: Index of the block whose output is mixed.
        partner: The row that each row is mixed with, int64 [rows].
        share: What each row keeps of itself, from a half to 1.
        both: Positions at which a row and its partner have tokens, bool [rows, length].
    """

    block: int
    partner: Tensor
    share: float
    both: Tensor


class HiddenMixup:
    """Mixes the output of one block between rows: TMix (Chen, Yang and Yang 2020, section 3.1).

    The block is drawn from a set for each micro-batch, the share from Beta(alpha, alpha), and the
    larger part is the row's own (manifold mixup, Verma et al. 2019, mixes the same way). Positions
    where only one of the two has a token stay as they are, and a row attends to its own length:
    the paper pads all rows to one length and mixes padding, too. Rows of one micro-batch are mixed;
    those are the same for any number of ranks unless `train.micro_batch_tokens` makes them.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        *,
        groups: Sequence[LayerGroup],
        blocks: Sequence[int],
        alpha: float,
    ) -> None:
        """Hook the blocks of `model`; nothing happens outside `mixed`.

        Args:
            model: The model.
            groups: Its layer groups.
            blocks: Indices of the blocks whose output may be mixed, from 0 at the bottom.
            alpha: Of the Beta distribution; larger mixes more evenly.

        Raises:
            ValueError: If the model has no such block.
        """
        found = [g for g in groups if g.kind == "block"]
        if outside := [b for b in blocks if not 0 <= b < len(found)]:
            raise ValueError(
                f"regularization.mixup.blocks: {outside[0]} is not one of the model's "
                f"{len(found)} blocks: use 0 to {len(found) - 1}"
            )
        self._blocks = tuple(blocks)
        self._alpha = alpha
        self._mixture: Mixture | None = None
        for index in self._blocks:
            (module,) = group_modules(model, found[index].parameters)
            module.register_forward_hook(self._after(index))

    def draw(self, inputs: Mapping[str, Tensor]) -> Mixture:
        """Return how the rows of `inputs` are mixed.

        Draws from torch's generator of the CPU, which the engine seeds with (seed, step,
        micro-batch).
        """
        rows = inputs["input_ids"].shape[0]
        place = int(torch.randint(len(self._blocks), ()))
        share = float(torch.distributions.Beta(self._alpha, self._alpha).sample())
        partner = torch.randperm(rows).to(inputs["input_ids"].device)
        tokens = tokens_of(inputs)
        both = tokens & tokens[partner]
        return Mixture(self._blocks[place], partner, max(share, 1.0 - share), both)

    @contextmanager
    def mixed(self, mixture: Mixture) -> Iterator[None]:
        """Mix rows in forwards inside the context, the same way in each."""
        self._mixture = mixture
        try:
            yield
        finally:
            self._mixture = None

    def _after(self, index: int) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> Any:
            del module, args
            mixture = self._mixture
            if mixture is None or mixture.block != index:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            other = hidden[mixture.partner]
            changed = torch.where(
                mixture.both[..., None],
                mixture.share * hidden + (1.0 - mixture.share) * other,
                hidden,
            )
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return after
