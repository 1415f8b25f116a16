"""Relative position biases that one block computes and hands on to those above it (T5).

Raffel et al. 2020, section 2.1: the first block's attention adds a learned scalar for each distance
of two tokens, and all blocks share it. So blocks that start above the first need the bias, though
not its hidden states; and rows without padding need it for the longest row alone, as a shorter
row's is its upper left corner.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def modules_with_bias(block: nn.Module) -> list[Any]:
    """Return the attentions of a block that compute a bias from the lengths alone."""
    return [
        m
        for m in block.modules()
        if getattr(m, "has_relative_attention_bias", False)
        and _depends_on_lengths(getattr(m, "compute_bias", None))
    ]


def _depends_on_lengths(compute: Any) -> bool:
    """Return whether a function computes the bias of any two lengths, not of a fixed window."""
    wanted = {"query_length", "key_length"}
    return callable(compute) and wanted <= inspect.signature(compute).parameters.keys()


def limit_length(module: Any, longest: Callable[[], int | None]) -> None:
    """Let an attention compute its bias for the longest row of a flat stream, not for the stream.

    Args:
        module: one of `modules_with_bias`.
        longest: returns the tokens of the longest row; None while rows are padded.
    """
    whole = module.compute_bias

    def compute_bias(query_length: int, key_length: int, *args: Any, **kwargs: Any) -> Tensor:
        limit = longest()
        if limit is not None:
            query_length = key_length = limit
        return whole(query_length, key_length, *args, **kwargs)

    vars(module)["compute_bias"] = compute_bias


@torch.no_grad()
def handed_on(block: nn.Module, *, length: int) -> tuple[Tensor, ...]:
    """Return the biases that a block would hand on for rows of a length, without running it."""
    return tuple(m.compute_bias(length, length) for m in modules_with_bias(block))
