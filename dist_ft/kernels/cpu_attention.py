"""Attention of short rows on a CPU: few operations for rows of near lengths, forward and backward.

`scaled_dot_product_attention` draws attention dropout in its plain path only, whose many small
operations (with their graph, and casts of bf16) cost more than the arithmetic at the lengths of
fine-tuning; `benchmarks/kernels.py` measures both. The gradient is written out here instead (Dao et
al. 2022, "FlashAttention", appendix B.2, without tiling), and dropout takes a random byte a
probability where torch draws a whole Bernoulli sample (see `cpu_dropout`).

One gather brings the tokens of all rows to groups that are padded alike (see `row_groups`), one
brings the results back. What lies between runs group by group, so that the scores of one stay in
the cache.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_ft.kernels.cpu_dropout import keep_mask
from dist_ft.kernels.row_groups import Group, Layout, Places, RowGroups


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    rows: RowGroups,
    scale: float | None = None,
    dropout: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """Return the attention of each row of a flat stream to itself.

    Args:
        query: [heads, tokens, head size], any floating-point type; computed in fp32 at least.
        key: [key heads, tokens, head size]; key heads divide heads.
        value: As the key.
        rows: The rows, whose groups are made once for all layers.
        scale: Factor of the scores; by default 1 / sqrt(head size).
        dropout: Share of the probabilities that are set to zero, drawn from torch's generator.
        causal: Whether a token sees only itself and those before it.

    Returns:
        [tokens, heads, head size] in the type of the query.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    layout = rows.layout(
        heads=query.shape[0], key_heads=key.shape[0], causal=causal,
        dtype=_wide(query.dtype),
    )  # fmt: skip
    inputs = (query, key, value)
    kept = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    return _Attend.apply(*inputs, layout, factor, dropout, kept)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Attend(torch.autograd.Function):
    """See `attend`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout,
        scale: float,
        dropout: float,
        kept: bool,
    ) -> Tensor:
        heads, _, size = query.shape
        key_heads = key.shape[0]
        q = _gathered(query.transpose(0, 1), layout.queries)
        k, v = (_gathered(t.transpose(0, 1), layout.keys) for t in (key, value))
        # A frozen prefix has no backward pass: one group's probabilities are enough at a time.
        saved = q.new_empty(layout.pairs if kept else layout.most_pairs)
        result = torch.empty_like(q)
        room = q.new_empty(layout.most_pairs)
        for group in layout.groups:
            queries, keys, pairs = _shapes(group, heads=heads, key_heads=key_heads, size=size)
            scores = _part(room, pairs)
            probabilities = saved[group.pairs].view(pairs) if kept else _part(saved, pairs)
            _multiply(
                q[group.queries].view(queries), k[group.keys].view(keys).transpose(1, 2),
                factor=scale, out=scores, bias=group.bias,
            )  # fmt: skip
            # Not in place, which is slower where a row of scores ends inside of a vector.
            torch.softmax(scores, -1, out=probabilities)
            weights, factor = probabilities, 1.0
            if dropout:
                # In the type of the scores: a mask would be converted each time.
                weights = scores.copy_(keep_mask(pairs, dropout=dropout)).mul_(probabilities)
                factor = 1.0 / (1.0 - dropout)
            _multiply(
                weights, v[group.keys].view(keys),
                factor=factor, out=result[group.queries].view(queries),
            )  # fmt: skip
            if dropout:
                # Half of each, negative where it was dropped, says both in the room of one tensor.
                torch.sub(weights, probabilities, alpha=0.5, out=probabilities)
        if kept:
            ctx.save_for_backward(q, k, v, saved)
        ctx.about = layout, scale, dropout, heads, key_heads
        return _returned(result, layout.queries, heads=heads, dtype=query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        layout, scale, dropout, heads, key_heads = ctx.about
        q, k, v, saved = ctx.saved_tensors
        size = q.shape[1]
        upper = _gathered(gradient, layout.queries)
        # Padded queries then add nothing to the gradients of keys and values.
        upper.index_fill_(0, layout.queries.padding, 0.0)
        of_query, of_key, of_value = (torch.empty_like(t) for t in (q, k, v))
        rooms = [q.new_empty(layout.most_pairs) for _ in range(3 if dropout else 2)]
        factor = 1.0 / (1.0 - dropout)
        for group in layout.groups:
            queries, keys, pairs = _shapes(group, heads=heads, key_heads=key_heads, size=size)
            above, kept = upper[group.queries].view(queries), saved[group.pairs].view(pairs)
            of_weights, of_scores, *more = (_part(room, pairs) for room in rooms)
            probabilities = weights = kept
            if dropout:
                weights = torch.clamp_min(kept, 0.0, out=of_scores)
            _multiply(
                weights.transpose(1, 2), above, factor=2.0 * factor if dropout else 1.0,
                out=of_value[group.keys].view(keys),
            )  # fmt: skip
            _multiply(
                above, v[group.keys].view(keys).transpose(1, 2), factor=factor, out=of_weights
            )
            if dropout:
                torch.ops.aten.threshold_backward.grad_input(
                    of_weights, kept, 0.0, grad_input=of_weights
                )
                probabilities = torch.abs(kept, out=more[0]).mul_(2.0)
            torch.ops.aten._softmax_backward_data.out(
                of_weights, probabilities, -1, kept.dtype, grad_input=of_scores
            )
            _multiply(
                of_scores, k[group.keys].view(keys),
                factor=scale, out=of_query[group.queries].view(queries),
            )  # fmt: skip
            _multiply(
                of_scores.transpose(1, 2), q[group.queries].view(queries),
                factor=scale, out=of_key[group.keys].view(keys),
            )  # fmt: skip
        dtype = gradient.dtype
        found = (
            _returned(of_query, layout.queries, heads=heads, dtype=dtype),
            _returned(of_key, layout.keys, heads=key_heads, dtype=dtype),
            _returned(of_value, layout.keys, heads=key_heads, dtype=dtype),
        )
        return (*(t.transpose(0, 1) for t in found), None, None, None, None)


def _part(room: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return the beginning of a flat tensor in this shape."""
    return room[: math.prod(shape)].view(shape)


def _shapes(
    group: Group, *, heads: int, key_heads: int, size: int
) -> tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]:
    """Return the shapes of a group's queries, keys and scores, a batch for each row and key head.

    The queries of the heads that share a key head follow each other, so that keys are not repeated.
    """
    batch, queries = group.rows * key_heads, heads // key_heads * group.length
    return (batch, queries, size), (batch, group.length, size), (batch, queries, group.length)


def _multiply(
    one: Tensor, other: Tensor, *, factor: float, out: Tensor, bias: Tensor | None = None
) -> None:
    """Write factor * one @ other + bias to `out`, which may hold anything."""
    if bias is None:
        out.baddbmm_(one, other, beta=0, alpha=factor)
    else:
        torch.baddbmm(bias.expand(out.shape), one, other, alpha=factor, out=out)


def _gathered(stream: Tensor, places: Places) -> Tensor:
    """Return [tokens, heads, size] as [places in the groups, size], in fp32 or wider."""
    flat = stream.reshape(-1, stream.shape[-1])
    return flat.index_select(0, places.gather).to(_wide(stream.dtype))


def _returned(found: Tensor, places: Places, *, heads: int, dtype: torch.dtype) -> Tensor:
    """Return [places in the groups, size] as [tokens, heads, size]."""
    return found.index_select(0, places.back).to(dtype).unflatten(0, (-1, heads))
