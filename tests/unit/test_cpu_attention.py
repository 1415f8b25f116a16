"""The attention of short rows on a CPU against torch's, and its dropout against its statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dist_ft.kernels.cpu_attention import attend


def _inputs(tokens: int, *, heads: int, key_heads: int, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(tokens + heads)
    # As a projection's output is seen: heads and tokens exchanged, so not contiguous.
    shapes = [(tokens, n, 8) for n in (heads, key_heads, key_heads)]
    made = [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in shapes]
    return [t.transpose(0, 1).requires_grad_() for t in made]


def _row_by_row(inputs: list[Tensor], *, lengths: list[int], scale: float, causal: bool) -> Tensor:
    """Run torch's attention on each row in float64, without dropout."""
    rows = zip(*(t.double().split(lengths, dim=1) for t in inputs), strict=True)
    found = [
        F.scaled_dot_product_attention(
            q[None], k[None], v[None], scale=scale, is_causal=causal, enable_gqa=True
        )[0]
        for q, k, v in rows
    ]
    return torch.cat(found, dim=1).transpose(0, 1)


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    groups=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    causal=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_outputs_and_gradients_are_torchs(
    lengths: list[int], groups: tuple[int, int], causal: bool, dtype: torch.dtype
) -> None:
    heads, key_heads = groups
    inputs = _inputs(sum(lengths), heads=heads, key_heads=key_heads, dtype=dtype)
    runs = [(1, n) for n in lengths]
    if len(set(lengths)) == 1:
        runs = [(len(lengths), lengths[0])]
    found = attend(*inputs, runs=runs, scale=0.3, causal=causal)
    expected = _row_by_row(inputs, lengths=lengths, scale=0.3, causal=causal)
    assert found.dtype == dtype
    upper = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, inputs, upper.to(dtype))
    wanted = torch.autograd.grad(expected, inputs, upper.to(dtype).double())
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    for one, other in zip((found, *gradients), (expected, *wanted), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=limit, atol=limit)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_gradient_is_that_of_what_was_drawn(dropout: float) -> None:
    inputs = _inputs(8, heads=2, key_heads=1, dtype=torch.float64)

    def seeded(*values: Any) -> Tensor:
        torch.manual_seed(0)
        return attend(*values, runs=[(2, 3), (1, 2)], dropout=dropout)

    assert torch.autograd.gradcheck(seeded, inputs)


def test_dropout_keeps_the_mean_and_follows_the_seed() -> None:
    q, k, _ = _inputs(400, heads=4, key_heads=4, dtype=torch.float32)
    ones = torch.ones_like(q)

    def run() -> Tensor:
        torch.manual_seed(1)
        return attend(q, k, ones, runs=[(10, 40)], dropout=0.2)

    found = run()
    assert torch.equal(found, run())
    assert not torch.equal(found, attend(q, k, ones, runs=[(10, 40)], dropout=0.2))
    assert 0.98 < float(found.mean()) < 1.02  # 64,000 draws of a weight
    assert float(found.std()) > 0.01
