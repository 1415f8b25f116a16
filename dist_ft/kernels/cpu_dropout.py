"""Dropout on a CPU (Srivastava et al. 2014): a byte of randomness an element, exact all the same.

Of `torch.nn.functional.dropout` on a CPU, drawing the Bernoulli sample takes most of the time:
more than the layer normalisations of a small encoder. A random byte decides to a part in 256 and
comes eight to a draw of torch's generator. The rest of the probability is dropped by single
places: as many as a Poisson number says, each anywhere, hit each element on its own with exactly
the probability that is missing (the counts of a split Poisson number are independent). Forward
and backward then are one conversion of the mask and one pass over the values each;
`benchmarks/kernels.py` measures it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_BYTES = 256
_MASK = torch.int8


def dropout(x: Tensor, *, p: float) -> Tensor:
    """Return `x` with elements dropped and the others divided by 1 - `p`.

    What is kept is multiplied by 1 / (1 - `p`) in fp32 at least and rounded once: torch rounds
    that factor to bf16 first. Infinity times zero is no number, as in torch. The gradient can't be
    differentiated again.

    Args:
        x: Any shape, floating-point type and strides; on another device than a CPU torch's
            own dropout runs. On the meta device it keeps what it keeps on a CPU.
        p: Probability of an element to be dropped, from torch's generator.

    Returns:
        A new tensor of the shape and type of `x`; `x` itself if nothing can be dropped.

    Raises:
        ValueError: `p` is no probability.
    """
    # At 0 and 1 nothing is drawn, and torch's has the right words for what is no probability.
    if not 0 < p < 1 or x.numel() == 0 or x.device.type not in ("cpu", "meta"):
        return F.dropout(x, p)
    return _Dropout.apply(x, p)


def keep_mask(shape: Sequence[int], *, dropout: float) -> Tensor:
    """Return an int8 tensor that is 1 with probability 1 - `dropout` and else 0.

    Each element is drawn for itself from torch's CPU generator, whatever type the mask is for. An
    integer, as torch converts booleans to floating-point types ten times as slowly.

    Args:
        shape: Of the mask.
        dropout: From 0 to below 1; the probability is that of float64, not a rounded one.
    """
    size = torch.Size(shape)
    count = size.numel()
    # A floor: bytes alone would drop too few, and what they drop can't be taken back.
    steps = int(dropout * _BYTES)
    words = torch.empty((count + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(_MASK)[:count].ge_(steps - _BYTES // 2)
    # An element is spared by all places with probability e^-rate.
    rate = -math.log((1 - dropout) / (1 - steps / _BYTES))
    if rate and count:
        hits = int(torch.poisson(torch.tensor(rate * count, dtype=torch.float64)))
        kept.index_fill_(0, torch.randint(count, (hits,)), 0)
    return kept.view(size)


class _Dropout(torch.autograd.Function):
    """See `dropout`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        kept = keep_mask(x.shape, dropout=p) if not x.is_meta else x.new_empty(x.shape, dtype=_MASK)
        ctx.save_for_backward(kept)
        ctx.scale = 1 / (1 - p)
        return _scaled(x, kept, ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (kept,) = ctx.saved_tensors
        return _scaled(gradient, kept, ctx.scale), None


def _scaled(x: Tensor, kept: Tensor, scale: float) -> Tensor:
    """Return x * kept * scale in one pass, into the memory of the converted mask."""
    result = kept.to(x.dtype)
    return torch.addcmul(x.new_zeros(()), x, result, value=scale, out=result)
