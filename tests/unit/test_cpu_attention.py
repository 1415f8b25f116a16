"""The attention of short rows on a CPU against torch's, and its dropout against its statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_ft.kernels.cpu_attention import attend
from dist_ft.kernels.cpu_dropout import keep_mask
from dist_ft.kernels.row_groups import RowGroups, groups_of, padded_length


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


# Mixed, near and far, in any order; one row; all of one length.
_LENGTHS = st.one_of(
    st.lists(st.integers(1, 33), min_size=1, max_size=9),
    st.integers(1, 17).map(lambda n: [n] * 4),
)


@given(
    lengths=_LENGTHS,
    groups=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    causal=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_outputs_and_gradients_are_torchs(
    lengths: list[int], groups: tuple[int, int], causal: bool, dtype: torch.dtype
) -> None:
    heads, key_heads = groups
    inputs = _inputs(sum(lengths), heads=heads, key_heads=key_heads, dtype=dtype)
    found = attend(*inputs, rows=RowGroups(tuple(lengths)), scale=0.3, causal=causal)
    expected = _row_by_row(inputs, lengths=lengths, scale=0.3, causal=causal)
    assert found.dtype == dtype
    upper = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, inputs, upper.to(dtype))
    wanted = torch.autograd.grad(expected, inputs, upper.to(dtype).double())
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    for one, other in zip((found, *gradients), (expected, *wanted), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=limit, atol=limit)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_gradient_is_that_of_what_was_drawn(dropout: float, causal: bool) -> None:
    inputs = _inputs(8, heads=2, key_heads=1, dtype=torch.float64)

    def seeded(*values: Any) -> Tensor:
        torch.manual_seed(0)
        return attend(*values, rows=RowGroups((3, 2, 3)), dropout=dropout, causal=causal)

    assert torch.autograd.gradcheck(seeded, inputs)


def test_dropout_keeps_the_mean_and_follows_the_seed() -> None:
    q, k, _ = _inputs(400, heads=4, key_heads=4, dtype=torch.float32)
    ones = torch.ones_like(q)

    def run() -> Tensor:
        torch.manual_seed(1)
        return attend(q, k, ones, rows=RowGroups((40,) * 10), dropout=0.2)

    found = run()
    assert torch.equal(found, run())
    assert not torch.equal(found, attend(q, k, ones, rows=RowGroups((40,) * 10), dropout=0.2))
    assert 0.98 < float(found.mean()) < 1.02  # 64,000 draws of a weight
    assert float(found.std()) > 0.01


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_micro_batch_gives_the_same_bits(dtype: torch.dtype, causal: bool) -> None:
    lengths = (9, 24, 3, 22, 24, 1, 40, 21)
    inputs = _inputs(sum(lengths), heads=4, key_heads=2, dtype=dtype)

    def run() -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        out = attend(*inputs, rows=RowGroups(lengths), dropout=0.1, causal=causal)
        return out, *torch.autograd.grad(out, inputs, torch.ones_like(out))

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_no_other(bad: float, dropout: float) -> None:
    lengths = (21, 24, 23)
    inputs = _inputs(sum(lengths), heads=2, key_heads=1, dtype=torch.float32)
    layout = RowGroups(lengths).layout(heads=2, key_heads=1, causal=False, dtype=torch.float32)
    assert len(layout.groups) == 1
    spoilt = [t.detach().clone() for t in inputs]
    for t in spoilt:
        t[:, :21] = bad
        t.requires_grad_()
    found: list[tuple[Tensor, ...]] = []
    for given_ in (inputs, spoilt):
        torch.manual_seed(0)
        out = attend(*given_, rows=RowGroups(lengths), dropout=dropout)
        found.append((out, *torch.autograd.grad(out, given_, torch.ones_like(out))))
    for place, (one, other) in enumerate(zip(*found, strict=True)):
        tokens = 1 if place else 0
        rest = [t.narrow(tokens, 21, 47) for t in (one, other)]
        torch.testing.assert_close(rest[0], rest[1], rtol=1e-6, atol=1e-7)


@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=8))
def test_groups_hold_each_row_once_and_pad_by_its_own_length(lengths: list[int]) -> None:
    found = groups_of(lengths, heads=12)
    assert sorted(row for rows, _ in found for row in rows.tolist()) == list(range(len(lengths)))
    for rows, length in found:
        assert all(lengths[i] <= length == padded_length(lengths[i]) for i in rows)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=9),
    size=st.sampled_from([8, 32]),
)
def test_a_row_gets_the_same_bits_in_any_micro_batch(lengths: list[int], size: int) -> None:
    torch.manual_seed(len(lengths))
    q, k, v = (torch.randn(2, sum(lengths), size) for _ in range(3))
    together = attend(q, k, v, rows=RowGroups(tuple(lengths)))
    begin = 0
    for length in lengths:
        row = slice(begin, begin + length)
        alone = attend(q[:, row], k[:, row], v[:, row], rows=RowGroups((length,)))
        assert torch.equal(alone, together[row])
        begin += length


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_pass_without_gradients_keeps_nothing_and_gives_the_same_bits(dropout: float) -> None:
    rows = RowGroups((9, 3, 40, 7, 7, 1))
    q, k, v = torch.randn(3, 2, 67, 8).unbind()
    found: list[Tensor] = []
    for grad in (True, False):
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad):
            out = attend(q.requires_grad_(), k, v, rows=rows, dropout=dropout)
        assert out.requires_grad == grad
        found.append(out.detach())
    assert torch.equal(*found)


def test_large_groups_are_split_for_the_cache() -> None:
    found = groups_of([64] * 100, heads=12)
    assert len(found) > 1
    assert max(len(rows) for rows, _ in found) - min(len(rows) for rows, _ in found) <= 1


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5, 0.9])
def test_each_of_four_neighbours_is_kept_as_often(dropout: float) -> None:
    torch.manual_seed(0)
    shares = keep_mask((100_000, 4), dropout=dropout).float().mean(0)
    # Four standard deviations.
    assert torch.all((shares - (1 - dropout)).abs() <= 4 * (dropout * (1 - dropout) / 1e5) ** 0.5)
