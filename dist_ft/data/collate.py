"""From shard columns to the padded tensors of a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from dist_ft.data.shards import Columns

_ATTENTION_MASK = "attention_mask"


@dataclass(frozen=True)
class CollateSpec:
    """Says which columns a task's micro-batch has and how they are padded.

    Attributes:
        ragged: list columns and the value they are padded with.
        scalar: columns with one number a row.
        inputs: columns which go to the model as keyword arguments; "attention_mask" needs no
            column, it is made from the lengths of `input_ids`.
        targets: columns which go to the task's loss and metrics.
        kept: columns handed on as they are, for decoding: strings as str, lists as numpy arrays.
        pad_side: where the padding goes; "left" for generating with a causal model.
    """

    ragged: Mapping[str, int | float]
    scalar: tuple[str, ...] = ()
    inputs: tuple[str, ...] = field(default=("input_ids", _ATTENTION_MASK))
    targets: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    pad_side: Literal["right", "left"] = "right"

    def __post_init__(self) -> None:
        known = {*self.ragged, *self.scalar}
        unknown = [c for c in (*self.inputs, *self.targets) if c not in known]
        if _ATTENTION_MASK in self.inputs and "input_ids" in self.ragged:
            unknown = [c for c in unknown if c != _ATTENTION_MASK]
        if unknown:
            raise ValueError(
                f"collate columns {unknown} are used as inputs or targets but are neither ragged "
                f"nor scalar: list them in one of the two (known: {sorted(known)})"
            )
        if self.pad_side not in ("right", "left"):
            raise ValueError(f"pad_side must be 'right' or 'left', got {self.pad_side!r}")

    @cached_property
    def columns(self) -> frozenset[str]:
        """The shard columns that the micro-batch is made from."""
        made = {_ATTENTION_MASK} - {*self.ragged, *self.scalar}
        needed = {*self.inputs, *self.targets, *self.kept} - made
        return frozenset(needed | ({"input_ids"} if _ATTENTION_MASK in self.inputs else set()))


def collate(
    columns: Columns, spec: CollateSpec
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns the model inputs and the targets of one micro-batch as tensors.

    Args:
        columns: the rows' columns as `ShardedDataset.take` returns them.
        spec: the columns to use and their padding.

    Returns:
        Two dicts of tensors on the CPU. A ragged column is [rows, longest row of that column], a
        scalar column [rows]; integers are int64, floats float32. `attention_mask` is int64, 1 on
        tokens and 0 on padding.

    Raises:
        ValueError: a column of the spec is not in the shards.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys((*spec.inputs, *spec.targets)):
        if name == _ATTENTION_MASK and name not in spec.ragged:
            tensors[name] = _mask(_column(columns, "input_ids"), pad_side=spec.pad_side)
        elif name in spec.ragged:
            tensors[name] = _pad(
                _column(columns, name), pad=spec.ragged[name], pad_side=spec.pad_side
            )
        else:
            values = np.asarray(_column(columns, name))
            tensors[name] = torch.from_numpy(values.astype(_tensor_dtype(values.dtype)))
    return {n: tensors[n] for n in spec.inputs}, {n: tensors[n] for n in spec.targets}


def kept_columns(columns: Columns, spec: CollateSpec) -> dict[str, list[Any]]:
    """Returns the columns kept for decoding, one list entry a row.

    Raises:
        ValueError: a column of the spec is not in the shards.
    """
    kept: dict[str, list[Any]] = {}
    for name in spec.kept:
        values = _column(columns, name)
        kept[name] = values.tolist() if isinstance(values, np.ndarray) else list(values)
    return kept


def _column(columns: Columns, name: str) -> Any:
    if name not in columns:
        raise ValueError(
            f"column {name!r} is not in the shards, which have {sorted(columns)}: "
            "prepare the data again with this task"
        )
    return columns[name]


def _tensor_dtype(dtype: np.dtype[Any]) -> type[np.generic]:
    return np.float32 if dtype.kind == "f" else np.int64


def _pad(
    rows: Sequence[np.ndarray], *, pad: int | float, pad_side: Literal["right", "left"]
) -> torch.Tensor:
    width = max(len(row) for row in rows)
    padded = np.full((len(rows), width), pad, dtype=_tensor_dtype(rows[0].dtype))
    for target, row in zip(padded, rows, strict=True):
        if pad_side == "right":
            target[: len(row)] = row
        else:
            target[width - len(row) :] = row
    return torch.from_numpy(padded)


def _mask(rows: Sequence[np.ndarray], *, pad_side: Literal["right", "left"]) -> torch.Tensor:
    lengths = np.array([len(row) for row in rows])
    places = np.arange(lengths.max())
    if pad_side == "left":
        places = places[::-1]
    return torch.from_numpy((places[None, :] < lengths[:, None]).astype(np.int64))
