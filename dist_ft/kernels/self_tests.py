"""Compares each implementation with plain torch on a few numbers: milliseconds, before a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_ft.kernels import unpadded_attention
from dist_ft.kernels.linear_cross_entropy import (
    linear_cross_entropy as chunked,
)
from dist_ft.kernels.linear_cross_entropy import reference_linear_cross_entropy

# Largest difference to the same in float32 (in float64 for float32), as a share of the largest
# value: a few roundings of the type.
TOLERANCE = {
    torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2,
}  # fmt: skip


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest expected value."""
    largest = float(expected.detach().double().abs().max())
    return float((found.double() - expected.double()).detach().abs().max()) / max(largest, 1e-30)


def compare(what: str, *, found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Check that a tensor is right for what was computed in `dtype`.

    Raises:
        RuntimeError: it is not; the message gives the difference.
    """
    limit = TOLERANCE[dtype]
    share = difference(found, expected)
    if not share <= limit:
        raise RuntimeError(f"{what} differs from plain torch by {share:.1e}, allowed {limit:.0e}")


def random(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers, the same on every device."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw).to(device, dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


def _attention(device: torch.device, dtype: torch.dtype, *, flash: bool) -> None:
    lengths = (5, 3, 3)
    q, k, v = (random(device, dtype, 1, 2, sum(lengths), 16, seed=i) for i in range(3))
    rows = unpadded_attention.RowRuns.of(lengths)
    source = SimpleNamespace(rows=SimpleNamespace(runs=rows))
    module: Any = SimpleNamespace(row_source=source, is_causal=False)
    found, _ = unpadded_attention.unpadded_attention(
        module, q, k, v, None, dropout=0.0, flash=flash
    )
    expected = [
        F.scaled_dot_product_attention(*(t.to(_wide(dtype)) for t in part))
        for part in zip(*(t.split(lengths, dim=2) for t in (q, k, v)), strict=True)
    ]
    compare(
        "attention", found=found, expected=torch.cat(expected, dim=2).transpose(1, 2), dtype=dtype
    )


def flash_attention(device: torch.device, dtype: torch.dtype) -> None:
    """Check torch's variable-length flash attention."""
    _attention(device, dtype, flash=True)


def attention_by_run(device: torch.device, dtype: torch.dtype) -> None:
    """Check the attention for rows without padding that runs everywhere."""
    _attention(device, dtype, flash=False)


def linear_cross_entropy(device: torch.device, dtype: torch.dtype) -> None:
    """Check the chunked loss and its gradients, over more than one chunk."""
    hidden, weight = random(device, dtype, 80, 16), random(device, dtype, 40, 16, seed=1)
    labels = torch.arange(80, device=device) % 40
    labels[::7] = -100
    results: list[tuple[Tensor, ...]] = []
    for function, kind in ((chunked, dtype), (reference_linear_cross_entropy, _wide(dtype))):
        given = [t.to(kind).requires_grad_() for t in (hidden, weight)]
        loss = function(given[0], given[1], labels, label_smoothing=0.1)
        results.append((loss.detach(), *torch.autograd.grad(loss, given)))
    for name, found, expected in zip(("loss", "dh", "dW"), *results, strict=True):
        compare(name, found=found, expected=expected, dtype=dtype)
