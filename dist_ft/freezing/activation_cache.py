"""The activation cache: what a frozen prefix returns for a row, computed once and kept on disk.

A store holds one task's rows at one boundary. Its rows lie one after the other without padding, so
where a row is follows from the lengths alone, every rank of a host uses the same file, and nothing
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
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from dist_ft.freezing.row_store import FoundRows, RowKeys, RowStore

log = logging.getLogger("dist_ft")


def cache_folder(run: Path, *, elsewhere: Path | None) -> Path:
    """Return the folder of a run's caches, one for each host in it.

    Args:
        run: the run's folder.
        elsewhere: a disk for caches, or None for the run's folder. Runs of one name may use one
            disk; each deletes what it does not know.
    """
    if elsewhere is None:
        return run / "cache"
    place = xxhash.xxh3_64_hexdigest(str(run.resolve()).encode())
    return elsewhere / f"{run.name}-{place[:8]}"


@dataclass(frozen=True)
class CachedTask:
    """A task whose rows are kept.

    Attributes:
        room: tokens that each row may have, int [rows].
        variants: how many augmented versions of each row there are; 1 without augmentation.
        data: names the data and their augmentation: what was kept of others is not taken for it.
    """

    room: npt.NDArray[Any]
    variants: int = 1
    data: str = ""


@dataclass
class ActivationCache:
    """Keeps the hidden states at boundaries of a model's trunk, for the rows of several tasks.

    Several processes of a host may use one folder; they must agree on all arguments.

    Attributes:
        folder: where the stores lie; nothing else may lie there.
        tasks: the tasks whose rows are kept.
        width: size of a hidden state.
        dtype: type of its values, that of the model's weights.
        budget_bytes: the most bytes of all stores together. Boundaries come in the order in which
            they are needed; of the first that does not fit, the lower rows are kept.
        damaged: rows found whose bytes were not those that were written.
        saved_step: step of the newest checkpoint. A run that is killed goes on from there: files of
            a phase that ended after it stay, if all that is wanted has room beside them.
    """

    folder: Path
    tasks: Mapping[str, CachedTask]
    width: int
    dtype: torch.dtype
    budget_bytes: int
    damaged: int = 0
    saved_step: int = -1
    _past: dict[str, tuple[int, int]] = field(default_factory=dict)
    _stores: dict[tuple[str, int], RowStore] = field(default_factory=dict)

    def open(self, boundaries: Sequence[tuple[int, str]], *, step: int = -1) -> int:
        """Keep these boundaries and forget all others; return the bytes that they may take.

        Args:
            boundaries: each boundary with a fingerprint of the weights below it, in the order in
                which they are needed. What was kept under another fingerprint is deleted.
            step: the step that comes next; without it, nothing stays that is not wanted.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            log.warning("%s can't be made (%s): nothing is kept", self.folder, error)
        wanted = {
            (task, boundary): ".".join((task, str(boundary), fingerprint, about.data)).strip(".")
            for boundary, fingerprint in boundaries
            for task, about in self.tasks.items()
        }
        self._leave_behind(wanted, step=step)
        # The disk has no room again before what is deleted is closed, too.
        self._stores = {}
        self._delete_all_but({*wanted.values(), *self._past})
        left = self.budget_bytes - sum(nbytes for _, nbytes in self._past.values())
        room = left
        # Opened anew even if known: with less to keep there may be room for more of its rows.
        stores: dict[tuple[str, int], RowStore] = {}
        for key, name in wanted.items():
            stores[key] = self._make(name, task=key[0], budget=left)
            left -= stores[key].nbytes
        self._stores = stores
        return room - left

    def _leave_behind(self, wanted: Mapping[tuple[str, int], str], *, step: int) -> None:
        """Choose which files that are not wanted any more stay, in case the run is killed soon."""
        self._past |= {store.name: (step, store.nbytes) for store in self._stores.values()}
        kept = {n: (end, b) for n, (end, b) in self._past.items() if end > self.saved_step}
        self._past = {n: about for n, about in kept.items() if n not in wanted.values()}
        tasks = [self.tasks[task] for task, _ in wanted]
        tokens = sum(t.variants * int(t.room.sum()) for t in tasks)
        past = sum(nbytes for _, nbytes in self._past.values())
        if tokens * self.width * self.dtype.itemsize + past > self.budget_bytes:
            self._past = {}

    def _delete_all_but(self, names: Collection[str]) -> None:
        with contextlib.suppress(OSError):  # there is no such folder, and none can be made
            for path in self.folder.iterdir():
                # Another rank may have been quicker; what it has open has another name on NFS, and
                # can't be deleted. What is left is only found again if it is right.
                if path.name.rpartition(".")[0] not in names:
                    with contextlib.suppress(OSError):
                        path.unlink()

    def _make(self, name: str, *, task: str, budget: int) -> RowStore:
        about = self.tasks[task]
        room = about.room.astype(np.int64)
        store = RowStore(name, room, about.variants, self.width, self.dtype)
        store.fit(budget)
        try:
            store.open(self.folder)
        except OSError as error:
            log.warning("%s can't hold %s (%s): its rows are not kept", self.folder, name, error)
            store.fit(0)
        return store

    def nbytes(self) -> int:
        """Return the bytes of all stores."""
        return sum(store.nbytes for store in self._stores.values())

    def read(
        self, boundary: int, *, keys: RowKeys, step: int, early: FoundRows | None = None
    ) -> FoundRows:
        """Return the hidden states of rows that are there.

        Args:
            boundary: the boundary.
            keys: the rows.
            step: the step that reads; rows that it or a later one wrote are not there.
            early: what `read_ahead` returned for these rows; read again if more is there by now.
        """
        store = self._stores[keys.task, boundary]
        if early is not None and early.store is store and early.keys.same_as(keys):
            written = store.written(keys, before=step)
            if np.array_equal(written, early.there):
                return early
        found = store.read(keys, before=step)
        if len(found.damaged):
            self.damaged += len(found.damaged)
            rows = ", ".join(map(str, found.damaged[:8].tolist()))
            log.warning("%s: rows %s are damaged and are computed again", store.name, rows)
        return found

    def read_ahead(
        self, boundary: int, *, keys: RowKeys, step: int, pin: bool = False
    ) -> FoundRows | None:
        """Return what is there now for a later step, from any thread; None if nothing is kept.

        Args:
            boundary: the boundary.
            keys: the rows.
            step: the step that will want them.
            pin: read into page-locked memory.
        """
        store = self._stores.get((keys.task, boundary))
        return None if store is None else store.read(keys, before=step, pin=pin)

    def write(self, boundary: int, *, keys: RowKeys, hidden: Tensor, step: int) -> None:
        """Keep the hidden states of rows, [their tokens, width] one row after the other."""
        store = self._stores.get((keys.task, boundary))
        problem = None if store is None else store.write(keys, hidden=hidden, step=step)
        if problem is not None:
            log.warning("%s: a row can't be written (%s): no more are kept", self.folder, problem)

    def complete(self, boundary: int) -> bool:
        """Return whether every row of every task is there for later steps."""
        return all(self._stores[task, boundary].complete() for task in self.tasks)

    def drop_from_memory(self) -> None:
        """Let the system forget what it keeps of the files in memory; a read is then the disk's."""
        for store in self._stores.values():
            store.drop_from_memory()

    def close(self) -> None:
        """Forget and delete everything."""
        self._stores = {}
        shutil.rmtree(self.folder, ignore_errors=True)  # other ranks do the same
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()  # unless another host has its folder there
