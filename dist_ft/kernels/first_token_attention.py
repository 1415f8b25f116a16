"""Attention that the first token of each row pays to its row, on a CPU, forward and backward.

It is what `dist_ft.model.last_block` leaves of a block's attention: one query a row. Keys and
values stay in the stream, each multiplied by its row's query or added to its row's sum; only the
scores, one a token and head, are padded for their softmax.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_ft.kernels.cpu_dropout import keep_mask


def attend_from_first(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Tensor,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return the attention of the first token of each row of a flat stream to its row.

    Args:
        query: [heads, tokens, head size], any floating-point type; computed in fp32 at least. Only
            the first tokens of rows are read.
        key: [heads, tokens, head size].
        value: As the key.
        lengths: Tokens of each row, int64 [rows], none of them 0.
        scale: Factor of the scores; by default 1 / sqrt(head size).
        dropout: Share of the probabilities that are set to zero, drawn from torch's generator.

    Returns:
        [tokens, heads, head size] in the type of the query, zero but for first tokens.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return _FromFirst.apply(query, key, value, lengths, factor, dropout)


class _FromFirst(torch.autograd.Function):
    """See `attend_from_first`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: Tensor,
        scale: float,
        dropout: float,
    ) -> Tensor:
        dtype = torch.promote_types(query.dtype, torch.float32)
        firsts = lengths.cumsum(0) - lengths
        row_of = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        q = query[:, firsts].transpose(0, 1).to(dtype) * scale
        k, v = (t.transpose(0, 1).to(dtype) for t in (key, value))
        scores = (k * q[row_of]).sum(-1)
        probabilities = _softmax(scores, row_of, firsts=firsts, longest=int(lengths.max()))
        kept = keep_mask(scores.shape, dropout=dropout) if dropout else None
        weights = probabilities if kept is None else probabilities * kept / (1.0 - dropout)
        out = query.new_zeros(query.shape[1], query.shape[0], query.shape[2])
        out[firsts] = _row_sums(v * weights[..., None], row_of, like=q).to(out.dtype)
        saved = (q, k, v, probabilities, firsts, row_of)
        ctx.save_for_backward(*saved, *(() if kept is None else (kept,)))
        ctx.about = scale, dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, probabilities, firsts, row_of, *rest = ctx.saved_tensors
        scale, dropout = ctx.about
        upper = gradient[firsts].to(q.dtype)
        above = upper[row_of]
        kept = rest[0] / (1.0 - dropout) if rest else None
        weights = probabilities if kept is None else probabilities * kept
        of_value = above * weights[..., None]
        of_weights = (v * above).sum(-1)
        if kept is not None:
            of_weights *= kept
        weighted = of_weights * probabilities
        sums = _row_sums(weighted, row_of, like=upper.new_empty(len(firsts), weighted.shape[1]))
        of_scores = weighted.addcmul_(probabilities, sums[row_of], value=-1.0)[..., None]
        of_key = q[row_of] * of_scores
        of_query = torch.zeros_like(gradient)
        of_query[firsts] = (_row_sums(k * of_scores, row_of, like=q) * scale).to(gradient.dtype)
        found = (t.to(gradient.dtype).transpose(0, 1) for t in (of_query, of_key, of_value))
        return (*found, None, None, None)


def _softmax(scores: Tensor, row_of: Tensor, *, firsts: Tensor, longest: int) -> Tensor:
    """Return the softmax over the tokens of each row of [tokens, heads]."""
    places = row_of * longest + torch.arange(len(row_of)) - firsts[row_of]
    padded = scores.new_full((len(firsts) * longest, scores.shape[1]), float("-inf"))
    padded[places] = scores
    return padded.unflatten(0, (-1, longest)).softmax(1).flatten(0, 1)[places]


def _row_sums(values: Tensor, row_of: Tensor, *, like: Tensor) -> Tensor:
    """Return the sum over the tokens of each row, in the shape of `like`."""
    return torch.zeros_like(like).index_add_(0, row_of, values)
