"""The activation cache: what a frozen prefix returns for a row, computed once and kept on disk.

A store holds one task's rows at one boundary. Its rows lie one after the other without padding, so
where a row is follows from the lengths alone, every rank of a host maps the same file, and nothing
has to be announced or merged: a row is there when its index entry says so. An entry names the
optimizer step that wrote the row and a hash of what was written.

A row counts as there only from the step after the one that wrote it. A run that was killed and
repeats the step then finds what the uninterrupted run found, and computes the same rows in the same
company: floating-point sums depend on which rows share a matrix product, so anything else would
break resuming to the bit.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

log = logging.getLogger("dist_ft")

Int64Array = npt.NDArray[np.int64]
_INDEX = np.dtype([("step", "<i8"), ("hash", "<u8")])


@dataclass
class ActivationCache:
    """Keeps the hidden states at boundaries of a model's trunk, for the rows of several tasks.

    Several processes of a host may use one folder; they must agree on all arguments.

    Attributes:
        folder: where the stores lie; nothing else may lie there.
        lengths: tokens of each row of each task that is cached, int [rows].
        width: size of a hidden state.
        dtype: type of its values, that of the model's weights.
        budget_bytes: the most bytes of all stores together. Boundaries come in the order in which
            they are needed; of the first that does not fit, the lower rows are kept.
        damaged: rows found whose bytes were not those that were written.
    """

    folder: Path
    lengths: Mapping[str, npt.NDArray[Any]]
    width: int
    dtype: torch.dtype
    budget_bytes: int
    damaged: int = 0
    _stores: dict[tuple[str, int], _Store] = field(default_factory=dict)

    def open(self, boundaries: Sequence[tuple[int, str]]) -> int:
        """Keep these boundaries and forget all others; return the bytes that they may take.

        Args:
            boundaries: each boundary with a fingerprint of the weights below it, in the order in
                which they are needed. What was kept under another fingerprint is deleted.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        wanted = {
            (task, boundary): f"{task}.{boundary}.{fingerprint}"
            for boundary, fingerprint in boundaries
            for task in self.lengths
        }
        for path in self.folder.iterdir():
            if path.name.rpartition(".")[0] not in wanted.values():
                path.unlink(missing_ok=True)  # another rank may have been quicker
        left = self.budget_bytes
        # Opened anew even if known: with less to keep there may be room for more of its rows.
        self._stores = {}
        for key, name in wanted.items():
            self._stores[key] = self._make(name, task=key[0], budget=left)
            left -= self._stores[key].nbytes
        return self.budget_bytes - left

    def _make(self, name: str, *, task: str, budget: int) -> _Store:
        row_bytes = self.lengths[task].astype(np.int64) * self.width * self.dtype.itemsize
        ends = np.cumsum(row_bytes)
        rows = int(np.searchsorted(ends, budget, side="right"))
        store = _Store(name, row_bytes[:rows], ends[:rows] - row_bytes[:rows])
        try:
            store.open(self.folder)
        except OSError as error:
            log.warning("%s can't hold %s (%s): its rows are not kept", self.folder, name, error)
            store = _Store(name, row_bytes[:0], ends[:0])
        return store

    def tasks(self) -> frozenset[str]:
        """Return the tasks whose rows are kept."""
        return frozenset(self.lengths)

    def nbytes(self) -> int:
        """Return the bytes of all stores."""
        return sum(store.nbytes for store in self._stores.values())

    def read(
        self, task: str, boundary: int, *, rows: Int64Array, step: int
    ) -> tuple[npt.NDArray[np.bool_], Tensor]:
        """Return which rows are there, and their hidden states one after the other.

        Args:
            task: the task.
            boundary: the boundary.
            rows: rows of the task, int64 [n].
            step: the step that reads; rows that it or a later one wrote are not there.

        Returns:
            Bool [n], and [tokens of the rows that are there, width] on the CPU.
        """
        store = self._stores[task, boundary]
        parts: list[npt.NDArray[np.uint8]] = []
        there = np.zeros(len(rows), dtype=np.bool_)
        for place in np.flatnonzero(store.written(rows, before=step)).tolist():
            part = store.row(int(rows[place]))
            if part is None:
                self.damaged += 1
                log.warning("%s: row %d is damaged and is computed again", store.name, rows[place])
                continue
            there[place] = True
            parts.append(part)
        if not parts:
            return there, torch.empty(0, self.width, dtype=self.dtype)
        flat = torch.from_numpy(np.concatenate(parts))
        return there, flat.view(self.dtype).view(-1, self.width)

    def missing(
        self, task: str, boundary: int, *, rows: Int64Array, step: int, verify: bool
    ) -> bool:
        """Return whether a row is not there for `step`.

        Args:
            task: the task.
            boundary: the boundary.
            rows: rows of the task, int64 [n].
            step: the step that is to read.
            verify: read the rows, too; a damaged one is not there.
        """
        store = self._stores[task, boundary]
        if not store.written(rows, before=step).all():
            return True
        return verify and any(store.row(row) is None for row in rows.tolist())

    def write(
        self, task: str, boundary: int, *, rows: Int64Array, hidden: Tensor, step: int
    ) -> None:
        """Keep the hidden states of rows, [their tokens, width] one row after the other."""
        store = self._stores.get((task, boundary))
        if store is None:
            return
        values = hidden.to("cpu", self.dtype).contiguous().view(torch.uint8).view(-1).numpy()
        sizes = self.lengths[task][rows].astype(np.int64) * self.width * self.dtype.itemsize
        ends = np.cumsum(sizes)
        assert ends[-1] == len(values), "rows have another length than they had when prepared"
        for row, start, end in zip(rows.tolist(), ends - sizes, ends, strict=True):
            store.put(row, values[start:end], step=step)

    def close(self) -> None:
        """Forget and delete everything."""
        self._stores = {}
        shutil.rmtree(self.folder, ignore_errors=True)  # other ranks do the same
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()  # unless another host has its folder there


@dataclass
class _Store:
    """One task's rows at one boundary; rows beyond the budget are never there."""

    name: str
    sizes: Int64Array
    starts: Int64Array
    _index: npt.NDArray[Any] | None = None
    _data: npt.NDArray[np.uint8] | None = None

    @property
    def nbytes(self) -> int:
        return int(self.sizes.sum())

    def open(self, folder: Path) -> None:
        if not len(self.sizes):
            return
        data, index = folder / f"{self.name}.data", folder / f"{self.name}.index"
        for path, size in ((data, self.nbytes), (index, len(self.sizes) * _INDEX.itemsize)):
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                # All at once: a full disk is an error here, and not a bus error at some later row.
                os.posix_fallocate(file, 0, size)
            except OSError:
                path.unlink(missing_ok=True)
                raise
            finally:
                os.close(file)
        self._data = np.memmap(data, dtype=np.uint8, mode="r+")
        self._index = np.memmap(index, dtype=_INDEX, mode="r+")

    def written(self, rows: Int64Array, *, before: int) -> npt.NDArray[np.bool_]:
        found = np.zeros(len(rows), dtype=np.bool_)
        if self._index is not None:
            inside = rows < len(self.sizes)
            steps = self._index["step"][rows[inside]]  # a new file is all 0; steps are kept plus 1
            found[inside] = (steps > 0) & (steps <= before)
        return found

    def row(self, row: int) -> npt.NDArray[np.uint8] | None:
        assert self._data is not None
        assert self._index is not None
        start = int(self.starts[row])
        part = self._data[start : start + int(self.sizes[row])]
        return (
            part if xxhash.xxh3_64_intdigest(part.data) == int(self._index["hash"][row]) else None
        )

    def put(self, row: int, values: npt.NDArray[np.uint8], *, step: int) -> None:
        if row >= len(self.sizes):
            return
        assert self._data is not None
        assert self._index is not None
        start = int(self.starts[row])
        self._data[start : start + len(values)] = values
        self._index["hash"][row] = xxhash.xxh3_64_intdigest(values.data)
        self._index["step"][row] = step + 1  # last: now the row is there
