"""Cross-entropy of a linear layer's outputs that never holds all of them.

The outputs of a language model's head, the logits, are as large as its vocabulary for each token:
512 tokens of a vocabulary of 128,000 take 250 MiB in float32, and the usual way holds three such
tensors. Here a few tokens' logits at a time become their share of the loss and of the gradients,
and are dropped. The gradients are made in the forward pass, as in Liger-Kernel (Hsu et al. 2024,
section 3.2), so the backward pass needs neither logits nor weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
# The logits of so many rows make matrix products that keep a CPU busy.
_LEAST_ROWS = 64
# Each chunk reads and writes the whole gradient of the weights.
_MOST_CHUNKS = 8
# Of a CPU: products of so many classes stay in its cache while they are added up (1.6 times quicker
# in bf16 than all at once). Elsewhere a launch costs more than memory traffic does.
_CPU_CLASSES = 2048


def chunk_rows(rows: int) -> int:
    """Return how many of `rows` go together: an eighth of them, but 64 at least."""
    return max(_LEAST_ROWS, -(-rows // _MOST_CHUNKS))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the cross-entropy of ``hidden @ weight.T + bias`` summed over the labelled rows.

    Args:
        hidden: what enters the layer, [..., hidden size], float32, bfloat16 or float64.
        weight: the layer's weights in the same type, [classes, hidden size].
        labels: class indices, int64 [...], -100 for a row that has no loss; such rows are dropped
            before anything is computed.
        bias: the layer's bias, [classes].
        token_weights: what each row's loss weighs, float32 [...]; 1 by default. It gets no
            gradient.
        label_smoothing: share of the target that all classes get alike (Szegedy et al. 2016).

    Returns:
        The sum, a scalar in float32, or in float64 if `hidden` is.

    Raises:
        ValueError: `labels` or `token_weights` is not of one value for each row.
        RuntimeError: in a second backward pass, as the gradients are gone after the first.
    """
    for name, given in (("labels", labels), ("token_weights", token_weights)):
        if given is not None and given.shape != hidden.shape[:-1]:
            raise ValueError(
                f"{name} must be of shape {tuple(hidden.shape[:-1])} for hidden states of "
                f"{tuple(hidden.shape)}, got {tuple(given.shape)}"
            )
    chosen = labels != IGNORE_INDEX
    weights = None if token_weights is None else token_weights[chosen]
    loss = _LinearCrossEntropy.apply(
        hidden[chosen], weight, bias, labels[chosen], weights, label_smoothing
    )
    assert isinstance(loss, Tensor)
    return loss


def reference_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the same with whole logits, as torch and transformers compute it."""
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    losses = F.cross_entropy(
        logits, labels.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    return (losses if token_weights is None else losses * token_weights.flatten()).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss of labelled rows; its gradients wait for the backward pass to be scaled."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        token_weights: Tensor | None,
        label_smoothing: float,
    ) -> Tensor:
        wanted = ctx.needs_input_grad
        loss = torch.zeros(
            (), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device
        )
        make = torch.empty_like if len(hidden) else torch.zeros_like
        # Sums over chunks are float32: in bf16 they doubled the error of the weights' gradient.
        gradients = (
            make(hidden) if wanted[0] else None,
            make(weight, dtype=loss.dtype) if wanted[1] else None,
            torch.zeros_like(bias, dtype=loss.dtype) if bias is not None and wanted[2] else None,
        )
        rows = min(len(hidden), chunk_rows(len(hidden)))
        # Made once: memory that is new costs as much time as what is computed in it.
        logits = hidden.new_empty(rows, len(weight))
        working = (
            logits if logits.dtype == loss.dtype else torch.empty_like(logits, dtype=loss.dtype)
        )
        for start in range(0, len(hidden), max(1, rows)):
            part = slice(start, start + rows)
            count = len(hidden[part])
            if bias is None:
                torch.mm(hidden[part], weight.T, out=logits[:count])
            else:
                torch.addmm(bias, hidden[part], weight.T, out=logits[:count])
            slope = working[:count].copy_(logits[:count])
            loss += _loss_to_slope(
                slope,
                labels[part],
                token_weights=None if token_weights is None else token_weights[part],
                label_smoothing=label_smoothing,
            )
            if gradients[2] is not None:
                gradients[2].add_(slope.sum(0))
            if any(wanted):
                slope = logits[:count].copy_(slope)
                _add_gradients(slope, hidden[part], weight, gradients=gradients[:2], part=part)
        ctx.gradients, ctx.dtype = gradients, hidden.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "linear_cross_entropy has no gradients any more: they were given away in the first "
                "backward pass. Run the forward pass again"
            )
        (scale,) = grad_outputs
        scaled = [None if g is None else _scaled(g, scale, dtype=ctx.dtype) for g in gradients]
        return (*scaled, None, None, None)


def _scaled(gradient: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return the gradient times a scalar as `dtype`, in its own memory if it has that type."""
    result = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    size = _classes_at_once(gradient)
    for target, part in zip(result.split(size), gradient.split(size), strict=True):
        # In float32: in bf16 the scale itself would be rounded.
        target.copy_(part.to(scale.dtype) * scale)
    return result


def _loss_to_slope(
    logits: Tensor, labels: Tensor, *, token_weights: Tensor | None, label_smoothing: float
) -> Tensor:
    """Return the summed loss of a chunk's logits, which become its gradient by them."""
    places = labels[:, None]
    logits -= logits.amax(-1, keepdim=True)
    losses = (label_smoothing - 1) * logits.gather(1, places)[:, 0]
    if label_smoothing:
        losses -= label_smoothing * logits.mean(-1)
    sums = logits.exp_().sum(-1)
    losses += sums.log()
    slope = logits.div_(sums[:, None])
    if label_smoothing:
        slope -= label_smoothing / slope.shape[1]
    slope.scatter_add_(1, places, slope.new_full((1, 1), label_smoothing - 1).expand_as(places))
    if token_weights is not None:
        losses *= token_weights
        slope *= token_weights[:, None]
    return losses.sum()


def _add_gradients(
    slope: Tensor,
    hidden: Tensor,
    weight: Tensor,
    *,
    gradients: tuple[Tensor | None, Tensor | None],
    part: slice,
) -> None:
    """Add a chunk's share to the gradients of hidden states and weights."""
    by_hidden, by_weight = gradients
    if by_hidden is not None:
        torch.mm(slope, weight, out=by_hidden[part])
    if by_weight is None:
        return
    first = part.start == 0  # nothing is there yet, and what is in memory does not count
    if by_weight.dtype == hidden.dtype:
        by_weight.addmm_(slope.T, hidden, beta=0 if first else 1)
        return
    size = _classes_at_once(by_weight)
    for sums, share in zip(by_weight.split(size), slope.split(size, dim=1), strict=True):
        product = share.T @ hidden
        sums.copy_(product) if first else sums.add_(product)


def _classes_at_once(tensor: Tensor) -> int:
    return _CPU_CLASSES if tensor.device.type == "cpu" else max(1, len(tensor))
