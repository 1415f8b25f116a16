"""How alike two representations of the same rows are."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def gram(representation: Tensor) -> Tensor:
    """Return the centred Gram matrix of the rows, [rows, rows], float64.

    Args:
        representation: Of the rows, [rows, features], floating point.
    """
    centred = representation.double()
    centred = centred - centred.mean(dim=0)
    return centred @ centred.T


def alignment(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the cosine of two flattened Gram matrices of the same rows.

    For centred linear Gram matrices that is the linear CKA (Kornblith et al. 2019), between 0
    and 1; the matrices are small whatever the width of the model.

    Raises:
        ValueError: If the numbers of rows differ.
    """
    if len(one) != len(other):
        raise ValueError(
            f"CKA compares the same rows, got {math.isqrt(len(one))} and {math.isqrt(len(other))}: "
            "measure both on one batch"
        )
    norms = math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))
    cross = sum(a * b for a, b in zip(one, other, strict=True))
    return cross / norms if norms > 0 else 1.0


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Return the linear CKA of two representations of the same rows, [rows, features] each."""
    return alignment(gram(one).flatten().tolist(), gram(other).flatten().tolist())
