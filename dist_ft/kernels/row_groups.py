"""Which rows of near lengths share one batch of small products, and where their tokens go.

An operation of torch costs microseconds before it computes anything, and a micro-batch has about as
many lengths as rows. Padding a few rows to a common length costs less than operations of their own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What attention costs forward and backward, in nanoseconds, measured in torch 2.13 on one core with
# AVX-512: a group (some 20 operations), a query of a head, a pair of query and key, and what a pair
# costs beyond that for each value of a head. Where they are wrong, only time is lost.
_GROUP, _QUERY, _PAIR, _PAIR_VALUE = 60_000.0, 60.0, 1.2, 0.09
# Vectors of 16 values: one value short of a full one, all of it is worth to be filled.
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
    _layouts: dict[tuple[int, int, int, bool, torch.dtype], Layout] = field(default_factory=dict)

    def layout(
        self, *, heads: int, key_heads: int, size: int, causal: bool, dtype: torch.dtype
    ) -> Layout:
        """Return the groups, which are the same for all layers of a micro-batch.

        Args:
            heads: of the queries.
            key_heads: of keys and values; divides heads.
            size: values of a head.
            causal: whether a token sees only itself and those before it.
            dtype: of the scores.
        """
        known = heads, key_heads, size, causal, dtype
        if known not in self._layouts:
            lengths = np.array(self.lengths)
            parts = groups_of(lengths, heads=heads, size=size)
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


def groups_of(
    lengths: np.ndarray | Sequence[int], *, heads: int, size: int
) -> list[tuple[np.ndarray, int]]:
    """Return the rows of each group and its padded length, at the least cost by the model above.

    Sorted by length, the rows of a group are neighbours: exchanging two of different groups could
    only lengthen one. So it is a shortest path over the distinct lengths.
    """
    lengths = np.asarray(lengths)
    counts = sorted(Counter(lengths.tolist()).items())
    before = np.zeros(len(counts) + 1)  # rows shorter than the i-th length
    before[1:] = np.cumsum([count for _, count in counts])
    best = np.zeros(len(counts) + 1)
    first = [0] * (len(counts) + 1)
    for end, (length, _) in enumerate(counts, 1):
        costs = best[:end] + group_cost(before[end] - before[:end], length, heads=heads, size=size)
        first[end] = int(costs.argmin())
        best[end] = costs[first[end]]
    order = np.argsort(lengths, kind="stable")
    found: list[tuple[np.ndarray, int]] = []
    end = len(counts)
    while end:
        begin = first[end]
        rows = order[int(before[begin]) : int(before[end])]
        length = _filled(counts[end - 1][0])
        pieces = min(len(rows), math.ceil(len(rows) * heads * length**2 / _MOST_PAIRS))
        found += [(piece, length) for piece in np.array_split(rows, pieces)]
        end = begin
    return found


def group_cost(rows: Any, longest: int, *, heads: int, size: int) -> Any:
    """Return about how many nanoseconds a group of so many rows takes, forward and backward."""
    length = _filled(longest)
    row = heads * length * (_QUERY + length * (_PAIR + _PAIR_VALUE * size))
    return _GROUP + rows * row


def _filled(length: int) -> int:
    """Return the length a row is padded to where it is alone."""
    return length + 1 if length % _VECTOR == _VECTOR - 1 else length


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
