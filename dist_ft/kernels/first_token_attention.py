"""Attention that the first token of each row pays to its row, on a CPU, forward and backward.

It is what `dist_ft.model.last_block` leaves of a block's attention: one query a row. Keys and
values are gathered once, padded to the longest row; everything else is a product and a sum.
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
        firsts = lengths.cumsum(0) - lengths
        steps = torch.arange(int(lengths.max()))
        outside = steps >= lengths[:, None]
        index = (firsts[:, None] + steps).masked_fill_(outside, 0).flatten()
        dtype = torch.promote_types(query.dtype, torch.float32)
        q = query[:, firsts].transpose(0, 1).to(dtype)[:, None] * scale
        k, v = (_gather(t, index, rows=len(lengths), dtype=dtype) for t in (key, value))
        scores = (k * q).sum(-1).masked_fill_(outside[..., None], float("-inf"))
        probabilities = scores.softmax(1)
        kept = keep_mask(probabilities.shape, dropout=dropout) if dropout else None
        weights = probabilities if kept is None else probabilities * kept / (1.0 - dropout)
        found = (v * weights[..., None]).sum(1)
        out = query.new_zeros(query.shape[1], query.shape[0], query.shape[2])
        out[firsts] = found.to(out.dtype)
        saved = (q, k, v, probabilities, firsts, outside)
        ctx.save_for_backward(*saved, *(() if kept is None else (kept,)))
        ctx.about = scale, dropout, query.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, probabilities, firsts, outside, *rest = ctx.saved_tensors
        scale, dropout, shape = ctx.about
        upper = gradient[firsts].to(q.dtype)[:, None]
        kept = rest[0] / (1.0 - dropout) if rest else None
        weights = probabilities if kept is None else probabilities * kept
        inside = ~outside.flatten()
        of_value = _flat(upper * weights[..., None], inside, dtype=gradient.dtype)
        of_weights = (v * upper).sum(-1)
        if kept is not None:
            of_weights *= kept
        of_scores = torch.ops.aten._softmax_backward_data(
            of_weights, probabilities, 1, probabilities.dtype
        )
        of_key = _flat(q * of_scores[..., None], inside, dtype=gradient.dtype)
        of_query = gradient.new_zeros(shape[1], shape[0], shape[2])
        of_query[firsts] = ((k * of_scores[..., None]).sum(1) * scale).to(gradient.dtype)
        found = (t.transpose(0, 1) for t in (of_query, of_key, of_value))
        return (*found, None, None, None)


def _gather(value: Tensor, index: Tensor, *, rows: int, dtype: torch.dtype) -> Tensor:
    """Return [heads, tokens, size] as [rows, longest, heads, size]."""
    return value.transpose(0, 1).index_select(0, index).to(dtype).unflatten(0, (rows, -1))


def _flat(padded: Tensor, inside: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return what `_gather` padded as [tokens, heads, size]: no token is in two places."""
    return padded.to(dtype).flatten(0, 1)[inside]
