"""Compares implementations with plain torch in float64: milliseconds, before a run.

An implementation is right in a type if it is hardly farther from the truth than plain torch is in
that type; being right to fewer digits, such as those of TF32, is being wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_ft.kernels.cases import Case, inputs, random

# How much farther from the truth than plain torch, or than one rounding of the type.
ROUNDINGS = 4.0
_GRADIENT_SEED = 99


@dataclass(frozen=True)
class Error:
    """How far one result is from the truth.

    Attributes:
        what: the result: the output, or the gradient by an input.
        found: largest difference to float64, as a share of the largest value there.
        eager: the same of plain torch in the type.
        limit: what `found` may be.
    """

    what: str
    found: float
    eager: float
    limit: float

    @property
    def is_right(self) -> bool:
        """Whether the result is right."""
        return self.found <= self.limit  # not so if it is no number


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest expected value."""
    largest = float(expected.detach().double().abs().max())
    return float((found.double() - expected.double()).detach().abs().max()) / max(largest, 1e-30)


def errors(
    case: Case, *, implementation: str, device: torch.device, dtype: torch.dtype
) -> list[Error]:
    """Return how far output and gradients of an implementation are from those in float64."""
    given = inputs(case, device=device, dtype=dtype)
    wide = [t.detach().double().requires_grad_() for t in given]
    found = _with_gradients(case.run(implementation, *given), given)
    eager = _with_gradients(case.reference(*given), given)
    exact = _with_gradients(case.reference(*wide), wide)
    names = ("output", *(f"gradient of {name}" for name in case.shapes))
    result: list[Error] = []
    for name, one, plain, truth in zip(names, found, eager, exact, strict=True):
        usual = difference(plain, truth)
        limit = ROUNDINGS * max(usual, torch.finfo(dtype).eps)
        result.append(Error(name, difference(one, truth), usual, limit))
    return result


def _with_gradients(output: Tensor, given: list[Tensor]) -> tuple[Tensor, ...]:
    grad = random(*output.shape, seed=_GRADIENT_SEED).to(output.device, given[0].dtype)
    return output.detach(), *torch.autograd.grad(output, given, grad.to(output.dtype))


def check(case: Case, implementation: str, *, device: torch.device, dtype: torch.dtype) -> None:
    """Check output and gradients of an implementation.

    Raises:
        RuntimeError: one is wrong; the message gives the difference.
    """
    for error in errors(case, implementation=implementation, device=device, dtype=dtype):
        if not error.is_right:
            raise RuntimeError(
                f"{error.what} differs from plain torch by {error.found:.1e}, allowed "
                f"{error.limit:.0e}"
            )
