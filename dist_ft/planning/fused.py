"""What the fused kernels of a GPU keep for the backward, imitated on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class FusedKernels(TorchFunctionMode):
    """Gives attention and dropout the memory of their GPU kernels.

    On the meta device torch takes their plain versions, which keep the whole matrix of attention
    weights and a mask in the activations' type. FlashAttention (Dao et al. 2022) keeps the output
    and one number for each query; fused dropout keeps a mask of one byte an element.
    """

    def __init__(self, flops: dict[str, int], group: Callable[[], str]) -> None:
        """Count attention's arithmetic into `flops` under what `group` returns."""
        super().__init__()
        self._flops, self._group = flops, group

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace the two functions; run every other one as it is."""
        del types
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is functional.dropout:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        batch, heads, length, width = query.shape
        flops = 2 * batch * heads * length * key.shape[2] * (width + value.shape[3])
        name = self._group()
        self._flops[name] = self._flops.get(name, 0) + flops
        return _Attention.apply(query, key, value)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    del inplace
    if p == 0 or not training:
        return x
    return _Dropout.apply(x)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:3], value.shape[3]))
        log_sum = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sum)
        return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(x, dtype=torch.bool))
        return torch.empty_like(x)
