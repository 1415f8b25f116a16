"""Post-norm sublayers of encoders like BERT, whose end one fused operation can run.

Each ends with ``LayerNorm(dropout(dense(hidden_states)) + input_tensor)``. Fusing gives two modules
another forward and touches neither parameters nor names. The normalisation is still called as a
module, with hidden states and residual: whoever hooks it, as ZeRO-3 does to gather its weights for
forward and backward, finds it where it was. Only the dropout module is not called; its rate and
whether it is on are read from it each time.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_ft.kernels.dropout_norm import reference_dropout_residual_norm

_ARGUMENTS = ["hidden_states", "input_tensor"]
_FORWARD = "forward"


class DropoutResidualNorm(Protocol):
    """``layer_norm(residual + dropout(hidden))``."""

    def __call__(
        self,
        hidden: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        *,
        p: float,
        eps: float,
    ) -> Tensor:
        """Return it, of the shape and type of `hidden`."""
        ...


def find_post_norms(model: nn.Module, *, widest: int) -> list[nn.Module]:
    """Return the sublayers that can be fused: by their parts, and by what they compute.

    Each is run once on a few numbers in training mode, and must give to the bit what plain torch
    gives for dropout, sum and normalisation under the same random numbers.

    Args:
        model: anywhere, but not partitioned; it is left as it was.
        widest: values of a row at most.
    """
    return [m for m in model.modules() if _has_the_parts(m, widest) and _computes_so(m)]


def fuse_post_norms(sublayers: Sequence[nn.Module], *, by: DropoutResidualNorm) -> None:
    """Let `by` run the end of each of the sublayers from now on."""

    def normalize(
        self: nn.LayerNorm, hidden: Tensor, residual: Tensor | None = None, p: float = 0.0
    ) -> Tensor:
        if residual is None:
            return nn.LayerNorm.forward(self, hidden)
        return by(hidden, residual, self.weight, self.bias, p=p, eps=self.eps)

    for sublayer in sublayers:
        norm: Any = sublayer.LayerNorm
        # Methods and not functions: a copy of the model gets its own.
        vars(sublayer)[_FORWARD] = MethodType(_end, sublayer)
        vars(norm)[_FORWARD] = MethodType(normalize, norm)


def _end(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    p = self.dropout.p if self.dropout.training else 0.0
    return self.LayerNorm(self.dense(hidden_states), input_tensor, p)


def _has_the_parts(module: Any, widest: int) -> bool:
    norm, dense = getattr(module, "LayerNorm", None), getattr(module, "dense", None)
    if type(norm) is not nn.LayerNorm or type(getattr(module, "dropout", None)) is not nn.Dropout:
        return False
    if len(norm.normalized_shape) != 1 or norm.normalized_shape[0] > widest:
        return False
    parts = set(dict(module.named_children()))
    return (
        norm.bias is not None
        and isinstance(getattr(dense, "in_features", None), int)
        and parts == {"dense", "dropout", "LayerNorm"}
        and not any(_FORWARD in vars(m) for m in (module, norm))
        and list(inspect.signature(module.forward).parameters) == _ARGUMENTS
    )


@torch.no_grad()
def _computes_so(module: Any) -> bool:
    norm, weight = module.LayerNorm, module.LayerNorm.weight
    hidden, residual = (
        torch.randn(2, 3, width, generator=torch.Generator().manual_seed(width)).to(weight)
        for width in (module.dense.in_features, norm.normalized_shape[0])
    )
    was = module.dropout.training
    results: list[Tensor] = []
    module.dropout.training = True
    devices = [weight.device] if weight.device.type == "cuda" else []
    try:
        for fused in (False, True):
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(0)
                if not fused:
                    results.append(module(hidden, residual))
                    continue
                inner, p = module.dense(hidden), module.dropout.p
                results.append(
                    reference_dropout_residual_norm(
                        inner, residual, weight, norm.bias, p=p, eps=norm.eps
                    )
                )
    finally:
        module.dropout.training = was
    return torch.equal(*results)
