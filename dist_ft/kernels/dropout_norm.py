"""Dropout, residual sum and layer normalisation as torch's own operations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# Values of a row that a program of the Triton kernels can hold.
WIDEST = 8192


def reference_dropout_residual_norm(
    hidden: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, p: float, eps: float
) -> Tensor:
    """Return ``layer_norm(residual + dropout(hidden))`` over the last dimension.

    Args:
        hidden: [..., width].
        residual: of the same shape.
        weight: [width].
        bias: [width].
        p: probability of an element of `hidden` to be dropped; 0 in evaluation.
        eps: added to the variance.
    """
    return F.layer_norm(F.dropout(hidden, p) + residual, weight.shape, weight, bias, eps)
