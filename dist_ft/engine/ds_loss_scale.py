"""The dynamic loss scale of an fp16 run, which has to outlive DeepSpeed's engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The scale, and what decides when it changes next (deepspeed.runtime.fp16.loss_scaler).
_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def read_loss_scale(ds_engine: Any, *, precision: str) -> dict[str, float]:
    """Return the dynamic loss scale and its counters; empty if the engine has none."""
    if precision != "fp16" or not ds_engine.optimizer.loss_scaler.dynamic:
        return {}
    return {name: getattr(ds_engine.optimizer.loss_scaler, name) for name in _FIELDS}


def write_loss_scale(ds_engine: Any, *, precision: str, state: Mapping[str, float]) -> None:
    """Go on with the loss scale of `state`, unless it is empty or the engine's scale is fixed."""
    if precision != "fp16" or not ds_engine.optimizer.loss_scaler.dynamic:
        return
    for name, value in state.items():
        setattr(ds_engine.optimizer.loss_scaler, name, value)
