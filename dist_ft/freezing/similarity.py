"""How alike two representations of the same rows are."""

from __future__ import annotations

from torch import Tensor


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Return the linear centred kernel alignment (Kornblith et al. 2019), between 0 and 1.

    Args:
        one: Representations of the rows, [rows, features], floating point.
        other: Of the same rows, [rows, other features].

    Raises:
        ValueError: If the numbers of rows differ.
    """
    if one.shape[0] != other.shape[0]:
        raise ValueError(
            f"CKA compares the same rows, got {one.shape[0]} and {other.shape[0]}: "
            "measure both on one batch"
        )
    one, other = one.double(), other.double()
    one, other = one - one.mean(dim=0), other - other.mean(dim=0)
    cross = (one.T @ other).square().sum()
    norms = (one.T @ one).norm() * (other.T @ other).norm()
    return float(cross / norms) if float(norms) > 0 else 1.0
