"""Mixout: some elements of a weight are those of the start for the length of a step."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# Elements whose random numbers are drawn at once: bounds the memory that they take.
_CHUNK = 1 << 22
_LOW = 0xFFFFFFFF


def mixout_key(seed: int, *, step: int, parameter: str) -> int:
    """Return the 64-bit key of a parameter's mask in a step; the same on every rank."""
    text = f"mixout {seed} {step} {parameter}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def kept_elements(
    key: int, *, start: int, length: int, probability: float, device: torch.device
) -> Tensor:
    """Return which of a parameter's elements keep their trained value, bool [length].

    Element i's draw is a function of (key, i) alone, two rounds of the integer hash "lowbias32"
    (Wellons 2018): a rank that holds any part of a parameter draws for just that part, on any
    device, and a gathered parameter has the mask of its parts.

    Args:
        key: From `mixout_key`.
        start: First element of the flattened parameter.
        length: Number of elements.
        probability: Chance of an element to be replaced.
        device: Where the mask is made.
    """
    kept = torch.empty(length, dtype=torch.bool, device=device)
    limit = round(probability * 2**32)
    for first in range(0, length, _CHUNK):
        last = min(length, first + _CHUNK)
        index = torch.arange(start + first, start + last, dtype=torch.int64, device=device)
        value = _mix((index & _LOW) ^ (key & _LOW))
        value = _mix(value ^ (index >> 32) ^ (key >> 32))
        kept[first:last] = value >= limit
    return kept


def _mix(value: Tensor) -> Tensor:
    """Return a bijective hash of 32-bit integers held in int64; products may wrap around."""
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & _LOW
    value = ((value ^ (value >> 15)) * 0x846CA68B) & _LOW
    return value ^ (value >> 16)


@torch.no_grad()
def mix(weights: Tensor, start: Tensor, *, kept: Tensor, probability: float) -> None:
    """Replace some weights by those of the start, and spread the others from it, in place.

    Lee, Cho and Kang 2020, "Mixout", definition 1, with the start as the target: a kept element
    is ``start + (weight - start) / (1 - probability)``, so that the mean over masks is the weight.
    Computed in fp32 and rounded to the weights' precision.

    Args:
        weights: Flat.
        start: As many, in any precision.
        kept: From `kept_elements`.
        probability: The one that `kept` was drawn with.
    """
    pulled = start.to(weights.device, torch.float32)
    spread = (weights.float() - pulled) * (kept / (1.0 - probability))
    weights.copy_(pulled + spread)
