"""Which rows of near lengths share one batch of small products, and where their tokens go.

An operation of torch costs microseconds before it computes anything, and a micro-batch has about as
many lengths as rows. Padding a few rows to a common length costs less than operations of their own.

What a row is padded to follows from its own length alone, not from its neighbours': so a row gets
the same bits in any micro-batch, and what was cached of a frozen prefix equals what is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

# Rows are padded to a multiple of a vector of fp32 values, the shortest to half of one.
_VECTOR = 16
# Scores of a group: a few tensors of as many fp32 values stay in a core's cache.
_MOST_PAIRS = 1 << 17


@dataclass(frozen=True)
class Group:
    """Rows that are padded to one length.

    Attributes:
        rows: how many.
        length: tokens of each, padding included.
        queries: the group's part of gathered queries.
        keys: the group's part of gathered keys and values.
        pairs: the group's part of the flat scores.
        bias: added to the scores, -inf where a token may not look, [rows * key heads or 1,
            1 or queries of a key head, length]; None for nothing.
    """

    rows: int
    length: int
    queries: slice
    keys: slice
    pairs: slice
    bias: Tensor | None


@dataclass(frozen=True)
class Places:
    """Where the tokens of a stream are in the groups, for each head.

    Attributes:
        gather: for each place (group, row, head, token) the place in the stream (token, head);
            padding repeats the row's last token, so that what a row holds stays with it. int64.
        back: for each place in the stream the place in the groups, int64 [tokens * heads].
        padding: the places that are padding, int64.
    """

    gather: Tensor
    back: Tensor
    padding: Tensor


@dataclass(frozen=True)
class Layout:
    """Groups for a number of heads.

    Attributes:
        groups: the groups.
        queries: where the queries are.
        keys: where keys and values are.
    """

    groups: tuple[Group, ...]
    queries: Places
    keys: Places

    @property
    def pairs(self) -> int:
        """Scores of all groups."""
        return self.groups[-1].pairs.stop

    @property
    def most_pairs(self) -> int:
        """Scores of the largest group."""
        return max(group.pairs.stop - group.pairs.start for group in self.groups)


@dataclass
class RowGroups:
    """Rows of a flat stream, to be taken together where their lengths are near.

    Attributes:
        lengths: tokens of each row, at least one, in the order of the stream.
    """

    lengths: tuple[int, ...]
    _layouts: dict[tuple[int, int, bool, torch.dtype], Layout] = field(default_factory=dict)

    def layout(self, *, heads: int, key_heads: int, causal: bool, dtype: torch.dtype) -> Layout:
        """Return the groups, which are the same for all layers of a micro-batch.

        Args:
            heads: of the queries.
            key_heads: of keys and values; divides heads.
            causal: whether a token sees only itself and those before it.
            dtype: of the scores.
        """
        known = heads, key_heads, causal, dtype
        if known not in self._layouts:
            lengths = np.array(self.lengths)
            parts = groups_of(self.lengths, heads=heads)
            begins = lengths.cumsum() - lengths
            queries = _places(parts, lengths, begins, heads=heads)
            keys = queries if key_heads == heads else _places(
                parts, lengths, begins, heads=key_heads)  # fmt: skip
            groups: list[Group] = []
            at = pairs = 0
            for rows, length in parts:
                next_at, next_pairs = at + len(rows) * length, pairs + heads * len(rows) * length**2
                own = lengths[rows]
                groups.append(
                    Group(
                        len(rows),
                        length,
                        slice(at * heads, next_at * heads),
                        slice(at * key_heads, next_at * key_heads),
                        slice(pairs, next_pairs),
                        _causal(length, heads // key_heads, dtype=dtype)
                        if causal
                        else _padding(own, length, key_heads, dtype=dtype),
                    )
                )
                at, pairs = next_at, next_pairs
            self._layouts[known] = Layout(tuple(groups), queries, keys)
        return self._layouts[known]


def groups_of(lengths: Sequence[int], *, heads: int) -> list[tuple[np.ndarray, int]]:
    """Return the rows of each group, in the order of the stream, and its padded length."""
    padded = np.array([padded_length(n) for n in lengths])
    found: list[tuple[np.ndarray, int]] = []
    for length in sorted(set(padded.tolist())):
        rows = np.flatnonzero(padded == length)
        pieces = min(len(rows), math.ceil(len(rows) * heads * length**2 / _MOST_PAIRS))
        found += [(piece, length) for piece in np.array_split(rows, pieces)]
    return found


def padded_length(length: int) -> int:
    """Return how many tokens a row is padded to."""
    return _VECTOR // 2 if length <= _VECTOR // 2 else -(-length // _VECTOR) * _VECTOR


def _places(
    parts: Sequence[tuple[np.ndarray, int]], lengths: np.ndarray, begins: np.ndarray, *, heads: int
) -> Places:
    gathers: list[np.ndarray] = []
    real: list[np.ndarray] = []
    each = np.arange(heads)[:, None]
    for rows, length in parts:
        at, last = np.arange(length), lengths[rows, None] - 1
        tokens = begins[rows, None] + np.minimum(at, last)
        gathers.append((tokens[:, None] * heads + each).ravel())
        there = (at <= last)[:, None]
        real.append(np.broadcast_to(there, (len(rows), heads, length)).ravel())
    gather, kept = np.concatenate(gathers), np.concatenate(real)
    places = kept.nonzero()[0]
    back = np.empty(len(places), dtype=np.int64)
    back[gather[places]] = places
    return Places(*map(torch.from_numpy, (gather, back, (~kept).nonzero()[0])))


def _causal(length: int, repeats: int, *, dtype: torch.dtype) -> Tensor:
    """Hide later tokens, and so the padding; a key head's query heads follow each other."""
    return torch.full((length, length), -math.inf, dtype=dtype).triu(1).repeat(repeats, 1)[None]


def _padding(
    lengths: np.ndarray, length: int, key_heads: int, *, dtype: torch.dtype
) -> Tensor | None:
    """Hide the padding."""
    if lengths.min() == length:
        return None
    hidden = torch.from_numpy(np.arange(length) >= lengths[:, None])
    bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)
    return bias.repeat_interleave(key_heads, 0)[:, None]
