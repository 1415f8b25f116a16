"""Rows of a micro-batch without their padding, one after the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dist_ft.kernels.unpadded_attention import RowRuns


@dataclass
class FlatRows:
    """Where the tokens of a padded micro-batch are.

    Attributes:
        shape: (rows, padded length) of the micro-batch.
        lengths: tokens of each row.
        places: the tokens' places in the flattened micro-batch, int64 [tokens], row after row.
        runs: the rows by length, for attention.
    """

    shape: tuple[int, int]
    lengths: tuple[int, ...]
    places: Tensor
    runs: RowRuns
    _flat: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _firsts: Tensor | None = None

    @classmethod
    def of(cls, attention_mask: Tensor, *, device: torch.device | None = None) -> FlatRows:
        """Return the rows of a mask (int64 [rows, length], 1 on tokens), which lies on the CPU."""
        places = attention_mask.flatten().nonzero().squeeze(1)
        lengths = tuple(attention_mask.sum(1).tolist())
        rows, width = attention_mask.shape
        if device is not None:
            places = places.to(device, non_blocking=True)
        return cls((rows, width), lengths, places, RowRuns.of([n for n in lengths if n]))

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return len(self.places)

    @property
    def firsts(self) -> Tensor:
        """The first token of each row that has any, int64 [rows], on the device of `places`."""
        if self._firsts is None:
            ends = zip(accumulate(self.lengths), self.lengths, strict=True)
            begins = [end - length for end, length in ends if length]
            self._firsts = torch.tensor(begins).to(self.places.device, non_blocking=True)
        return self._firsts

    def flatten(self, value: Tensor) -> Tensor:
        """Return the tokens of a padded tensor.

        Args:
            value: [rows or 1, length, ...]; one row stands for all.

        Returns:
            [1, tokens, ...].
        """
        if value.shape[0] == 1 and self.shape[0] > 1:
            return value[:, self.places % self.shape[1]]
        return value.flatten(0, 1).index_select(0, self.places)[None]

    def flatten_known(self, value: Any) -> Any:
        """Return what a model hands from block to block, flattened where it is per token."""
        if isinstance(value, tuple):
            return tuple(self.flatten_known(v) for v in value)
        if not isinstance(value, Tensor) or not self._per_token(value):
            return value
        if value.requires_grad:
            return self.flatten(value)
        # Every block gets the same rotary embeddings.
        if id(value) not in self._flat:
            self._flat[id(value)] = (value, self.flatten(value))
        return self._flat[id(value)][1]

    def _per_token(self, value: Tensor) -> bool:
        # A position bias [1, heads, length, length] is none, however many heads there are.
        rows, width = self.shape
        return value.dim() in (2, 3) and value.shape[1] == width and value.shape[0] in (1, rows)

    def pad(self, value: Tensor) -> Tensor:
        """Return [1, tokens, ...] as [rows, length, ...], zero on the padding."""
        rows, width = self.shape
        if self.tokens == rows * width:
            return value[0].unflatten(0, (rows, width))
        padded = value.new_zeros(rows * width, *value.shape[2:])
        return padded.index_copy(0, self.places, value[0]).unflatten(0, (rows, width))

    def pick_firsts(self, value: Tensor) -> Tensor:
        """Return the first tokens of [1, tokens, ...] as [1, rows that have any, ...]."""
        return value.index_select(1, self.firsts)

    def by_row(self, firsts: Tensor) -> Tensor:
        """Return first tokens [1, rows that have any, ...] as [rows, 1, ...]; others get zeros."""
        rows = self.shape[0]
        if firsts.shape[1] < rows:
            filled = torch.tensor(self.lengths, device=firsts.device).nonzero().squeeze(1)
            empty = firsts.new_zeros(1, rows, *firsts.shape[2:])
            firsts = empty.index_copy(1, filled, firsts)
        return firsts[0].unsqueeze(1)
