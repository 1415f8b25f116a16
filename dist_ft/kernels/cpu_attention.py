"""Attention of short rows on a CPU: a dozen operations a run of rows, forward and backward.

`scaled_dot_product_attention` draws attention dropout in its plain path only, whose many small
operations (with their graph, and casts of bf16) cost more than the arithmetic at the lengths of
fine-tuning; `benchmarks/kernels.py` measures both. The gradient is written out here instead (Dao et
al. 2022, "FlashAttention", appendix B.2, without tiling), and dropout takes a random byte a
probability where torch draws a whole Bernoulli sample (see `cpu_dropout`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_ft.kernels.cpu_dropout import keep_mask


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    runs: Sequence[tuple[int, int]],
    scale: float | None = None,
    dropout: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """Return the attention of each row of a flat stream to itself.

    Args:
        query: [heads, tokens, head size], any floating-point type; computed in fp32 at least.
        key: [key heads, tokens, head size]; key heads divide heads.
        value: As the key.
        runs: (rows, tokens of each) of neighbours of one length, in the order of the stream.
        scale: Factor of the scores; by default 1 / sqrt(head size).
        dropout: Share of the probabilities that are set to zero, drawn from torch's generator.
        causal: Whether a token sees only itself and those before it.

    Returns:
        [tokens, heads, head size] in the type of the query.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return _Attend.apply(query, key, value, tuple(runs), factor, dropout, causal)


class _Attend(torch.autograd.Function):
    """See `attend`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        runs: tuple[tuple[int, int], ...],
        scale: float,
        dropout: float,
        causal: bool,
    ) -> Tensor:
        heads, tokens, size = query.shape
        out = query.new_empty(tokens, heads, size)
        saved: list[Tensor] = []
        keeps = 1.0 - dropout
        for part, (count, length) in _parts(runs):
            q, k, v = (_wide(t[:, part], count, heads=heads) for t in (query, key, value))
            scores = torch.bmm(q.mul_(scale), k.transpose(1, 2))
            if causal:
                scores.masked_fill_(_later(length), float("-inf"))
            probabilities = scores.softmax(-1)
            kept = keep_mask(probabilities.shape, dropout=dropout) if dropout else None
            weights = probabilities if kept is None else probabilities * kept
            result = torch.bmm(weights, v)
            if kept is not None:
                result.mul_(1.0 / keeps)
            _put(out[part], result, count=count)
            saved += [q, k, v, probabilities] if kept is None else [q, k, v, probabilities, kept]
        ctx.save_for_backward(*saved)
        ctx.about = runs, scale, dropout, key.shape[0]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        runs, scale, dropout, key_heads = ctx.about
        tokens, heads, size = gradient.shape
        of_query = gradient.new_empty(tokens, heads, size)
        of_key, of_value = (gradient.new_empty(tokens, key_heads, size) for _ in range(2))
        saved, each = ctx.saved_tensors, 5 if dropout else 4  # unpacked once: a recomputation
        for number, (part, (count, _)) in enumerate(_parts(runs)):
            q, k, v, probabilities, *rest = saved[each * number : each * (number + 1)]
            upper = _wide(gradient[part].transpose(0, 1), count, heads=heads)
            if rest:
                upper.mul_(1.0 / (1.0 - dropout))
            weights = probabilities * rest[0] if rest else probabilities
            _put(of_value[part], torch.bmm(weights.transpose(1, 2), upper), count=count)
            of_weights = torch.bmm(upper, v.transpose(1, 2))
            if rest:
                of_weights.mul_(rest[0])
            of_scores = torch.ops.aten._softmax_backward_data(
                of_weights, probabilities, -1, probabilities.dtype
            )
            _put(of_query[part], torch.bmm(of_scores, k).mul_(scale), count=count)
            # The saved query is scaled already.
            _put(of_key[part], torch.bmm(of_scores.transpose(1, 2), q), count=count)
        found = (t.transpose(0, 1) for t in (of_query, of_key, of_value))
        return (*found, None, None, None, None)


def _parts(runs: Sequence[tuple[int, int]]) -> Iterator[tuple[slice, tuple[int, int]]]:
    """Yield the tokens of each run and the run."""
    begin = 0
    for count, length in runs:
        yield slice(begin, begin + count * length), (count, length)
        begin += count * length


def _wide(value: Tensor, count: int, *, heads: int) -> Tensor:
    """Return a copy in fp32 or wider, [rows * heads, tokens, head size], key heads repeated.

    Args:
        value: [its heads, rows * tokens, head size].
        count: Rows.
        heads: Heads of the query.
    """
    own, tokens, size = value.shape
    rows = value.unflatten(1, (count, tokens // count)).transpose(0, 1)
    dtype = torch.promote_types(value.dtype, torch.float32)
    copy = torch.empty(count, own, heads // own, tokens // count, size, dtype=dtype)
    return copy.copy_(rows.unsqueeze(2)).flatten(0, 2)


def _put(target: Tensor, found: Tensor, *, count: int) -> None:
    """Write [rows * heads, tokens, size] to [rows * tokens, its heads, size], summing repeats."""
    tokens, own, size = target.shape
    found = found.view(count, own, -1, tokens // count, size)
    summed = found.sum(2) if found.shape[2] > 1 else found[:, :, 0]
    target.unflatten(0, (count, -1)).copy_(summed.transpose(1, 2))


def _later(length: int) -> Tensor:
    """Return which tokens come after each token, [length, length]."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)
