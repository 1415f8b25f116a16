"""From shard columns to the padded tensors of a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from dist_ft.data.shards import Columns

_ATTENTION_MASK = "attention_mask"


@dataclass(frozen=True)
class ArrayInput:
    """An input made from arrays of one size, which shards hold flat, as small integers.

    Attributes:
        column: the list column.
        shape: shape of a row's array, channels first.
        scale: factor of the integers, before mean and deviation.
        mean: subtracted, for each channel.
        std: divided by, for each channel.
    """

    column: str
    shape: tuple[int, ...]
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def tensor(self, rows: Sequence[np.ndarray]) -> torch.Tensor:
        """Returns the normalised arrays, float32 [rows, *shape]."""
        flat = torch.from_numpy(np.stack(list(rows)))
        sizes = (1, -1, *(1 for _ in self.shape[1:]))
        mean, std = (torch.tensor(v).view(sizes) for v in (self.mean, self.std))
        return (flat.view(-1, *self.shape).float() * self.scale - mean) / std


@dataclass(frozen=True)
class CollateSpec:
    """Says which columns a task's micro-batch has and how they are padded.

    Attributes:
        ragged: list columns and the value they are padded with.
        scalar: columns with one number a row.
        inputs: columns which go to the model as keyword arguments; "attention_mask" needs no
            column, it is made from the lengths of `mask_of`.
        targets: columns which go to the task's loss and metrics.
        kept: columns handed on as they are, for decoding: strings as str, lists as numpy arrays.
        pad_side: where the padding goes; "left" for generating with a causal model.
        arrays: inputs that are made from arrays of one size.
        mask_of: list column that the attention mask is made from.
    """

    ragged: Mapping[str, int | float]
    scalar: tuple[str, ...] = ()
    inputs: tuple[str, ...] = field(default=("input_ids", _ATTENTION_MASK))
    targets: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    pad_side: Literal["right", "left"] = "right"
    arrays: Mapping[str, ArrayInput] = field(default_factory=dict)
    mask_of: str = "input_ids"

    def __post_init__(self) -> None:
        known = {*self.ragged, *self.scalar, *self.arrays}
        unknown = [c for c in (*self.inputs, *self.targets) if c not in known]
        if _ATTENTION_MASK in self.inputs and self.mask_of in self.ragged:
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
        needed = {*self.inputs, *self.targets, *self.kept} - made - self.arrays.keys()
        needed |= {array.column for array in self.arrays.values()}
        return frozenset(needed | ({self.mask_of} if _ATTENTION_MASK in self.inputs else set()))


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
    filled = _Filled(spec.pad_side)
    for name in dict.fromkeys((*spec.inputs, *spec.targets)):
        if name == _ATTENTION_MASK and name not in spec.ragged:
            places = filled.of(_column(columns, spec.mask_of))
            tensors[name] = torch.from_numpy(places.astype(np.int64))
        elif name in spec.arrays:
            array = spec.arrays[name]
            tensors[name] = array.tensor(_column(columns, array.column))
        else:
            tensors[name] = _rectangle(columns, name, spec=spec, filled=filled)
    return {n: tensors[n] for n in spec.inputs}, {n: tensors[n] for n in spec.targets}


def _rectangle(
    columns: Columns, name: str, *, spec: CollateSpec, filled: _Filled | None = None
) -> torch.Tensor:
    """Returns a column as a tensor: padded to [rows, longest] if ragged, else [rows]."""
    if name in spec.ragged:
        filled = filled or _Filled(spec.pad_side)
        return _pad(_column(columns, name), pad=spec.ragged[name], filled=filled)
    values = np.asarray(_column(columns, name))
    return torch.from_numpy(values.astype(_tensor_dtype(values.dtype)))


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


class _Filled:
    """Which places of padded rows hold tokens; found once for columns of the same lengths."""

    def __init__(self, pad_side: Literal["right", "left"]) -> None:
        self._pad_side = pad_side
        self._found: dict[bytes, npt.NDArray[np.bool_]] = {}

    def of(self, rows: Sequence[np.ndarray]) -> npt.NDArray[np.bool_]:
        """Returns where the rows' tokens are, bool [rows, longest]."""
        lengths = np.fromiter(map(len, rows), dtype=np.int32, count=len(rows))
        key = lengths.tobytes()
        if key not in self._found:
            width = int(lengths.max())
            # The smallest numbers that can count so far, as this is a large share of a batch's
            # cost.
            dtype = np.int16 if width < 2**15 else np.int32
            places = np.arange(width, dtype=dtype)
            if self._pad_side == "left":
                places = places[::-1]
            self._found[key] = places < lengths.astype(dtype)[:, None]
        return self._found[key]


def _pad(rows: Sequence[np.ndarray], *, pad: int | float, filled: _Filled) -> torch.Tensor:
    places = filled.of(rows)
    padded = np.full(places.shape, pad, dtype=_tensor_dtype(rows[0].dtype))
    # One assignment for all rows: their tokens, one after the other, fill these places in order.
    padded[places] = np.concatenate(rows)
    return torch.from_numpy(padded)
