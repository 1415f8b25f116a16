"""One file of hidden states: rows at fixed places, each with the hash of what was written.

Rows are read and written by ``pread`` and ``pwrite``. Both let go of the interpreter, so that a
thread which reads ahead from a slow disk does not hold up the one that trains, as a page fault of a
memory map would; and a file that was cut short is a damaged row, not a bus error.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

Int64Array = npt.NDArray[np.int64]
# An entry is there when its step is not 0; steps are kept plus 1.
_INDEX = np.dtype([("step", "<i8"), ("hash", "<u8"), ("tokens", "<i8")])


@dataclass(frozen=True)
class RowKeys:
    """Rows as they are in a micro-batch.

    Attributes:
        task: the task.
        rows: rows of its data, int64 [n].
        variants: which augmented version of each row it is, int64 [n]; 0 without augmentation.
        lengths: tokens of each, int64 [n].
    """

    task: str
    rows: Int64Array
    variants: Int64Array
    lengths: Int64Array

    def same_as(self, other: RowKeys) -> bool:
        """Return whether these are the same rows in the same order."""
        pairs = (
            (self.rows, other.rows), (self.variants, other.variants), (self.lengths, other.lengths)
        )  # fmt: skip
        return self.task == other.task and all(np.array_equal(*pair) for pair in pairs)

    def select(self, places: Int64Array) -> RowKeys:
        """Return some of the rows, by their places."""
        return RowKeys(
            self.task, self.rows[places], self.variants[places], self.lengths[places]
        )  # fmt: skip


@dataclass
class FoundRows:
    """What a store had of the rows asked for.

    Attributes:
        store: where it was read.
        keys: the rows.
        there: which rows are there, bool [n].
        hidden: their hidden states one after the other, [tokens, width] on the CPU.
        damaged: rows whose bytes were not those that were written.
    """

    store: RowStore
    keys: RowKeys
    there: npt.NDArray[np.bool_]
    hidden: Tensor
    damaged: Int64Array


@dataclass
class RowStore:
    """The hidden states of one task's rows at one boundary; rows beyond `slots` are never there.

    A row has a slot for each of its variants, all rows' first variants first. Where a slot is
    follows from the room that each row has, so processes need not tell each other anything.

    Attributes:
        name: of the files.
        room: tokens that a slot of each row holds, int64 [rows]; what is longer is not kept.
        variants: augmented versions of each row.
        width: values of a token's hidden state.
        dtype: type of a value.
        slots: how many of the slots are kept, from the first on.
    """

    name: str
    room: Int64Array
    variants: int
    width: int
    dtype: torch.dtype
    slots: int = 0
    _ends: Int64Array = field(init=False)
    _index: npt.NDArray[Any] | None = None
    _data: IO[bytes] | None = None
    _stopped: bool = False

    def __post_init__(self) -> None:
        self._ends = np.cumsum(self.room.astype(np.int64) * self._token_bytes)

    @property
    def _token_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def fit(self, budget: int) -> None:
        """Keep as many slots as have room in `budget` bytes."""
        variant = int(self._ends[-1]) if len(self._ends) else 0
        whole = min(self.variants, budget // variant) if variant else 0
        rest = 0
        if whole < self.variants:
            rest = int(np.searchsorted(self._ends, budget - whole * variant, side="right"))
        self.slots = whole * len(self.room) + rest

    @property
    def nbytes(self) -> int:
        """Bytes that the kept slots take."""
        if not self.slots:
            return 0
        whole, rest = divmod(self.slots, len(self.room))
        return whole * int(self._ends[-1]) + (int(self._ends[rest - 1]) if rest else 0)

    def open(self, folder: Path) -> None:
        """Make or find the files.

        Raises:
            OSError: there is no room for them.
        """
        if not self.slots:
            return
        data, index = folder / f"{self.name}.data", folder / f"{self.name}.index"
        file = _open_shared(data)
        try:
            # All at once: a full disk is an error here, and not at some later row.
            os.posix_fallocate(file.fileno(), 0, self.nbytes)
            with index.open("a+b") as entries:
                os.posix_fallocate(entries.fileno(), 0, self.slots * _INDEX.itemsize)
        except OSError:
            if _is_last_user(file):
                data.unlink(missing_ok=True)
                index.unlink(missing_ok=True)
            file.close()
            raise
        # Kept open by whoever still reads from this store.
        self._data = file
        self._index = np.asarray(np.memmap(index, dtype=_INDEX, mode="r+"))

    def _slots_of(self, keys: RowKeys) -> Int64Array:
        return keys.variants * len(self.room) + keys.rows

    def _start(self, slot: int) -> int:
        variant, row = divmod(slot, len(self.room))
        end = variant * int(self._ends[-1]) + int(self._ends[row])
        return end - int(self.room[row]) * self._token_bytes

    def written(self, keys: RowKeys, *, before: int) -> npt.NDArray[np.bool_]:
        """Return which rows an earlier step than `before` wrote, bool [n]."""
        found = np.zeros(len(keys.rows), dtype=np.bool_)
        if self._index is not None:
            slots = self._slots_of(keys)
            inside = slots < self.slots
            entries = self._index[slots[inside]]
            steps = entries["step"]
            # A row of another length is not this row, whatever number it has.
            same = entries["tokens"] == keys.lengths[inside]
            found[inside] = (steps > 0) & (steps <= before) & same
        return found

    def complete(self) -> bool:
        """Return whether every row of every variant has been written by some step."""
        everything = self.slots == self.variants * len(self.room)
        return everything and self._index is not None and bool((self._index["step"] > 0).all())

    def read(self, keys: RowKeys, *, before: int, pin: bool = False) -> FoundRows:
        """Return the rows that an earlier step than `before` wrote, checked by their hashes.

        Args:
            keys: the rows.
            before: the step that reads.
            pin: read into page-locked memory.
        """
        there = self.written(keys, before=before)
        places = np.flatnonzero(there)
        tokens = keys.lengths[places]
        hidden = torch.empty(int(tokens.sum()), self.width, dtype=self.dtype, pin_memory=pin)
        damaged: list[int] = []
        if len(places):
            assert self._data is not None
            assert self._index is not None
            file = self._data.fileno()
            slots = self._slots_of(keys)[places]
            buffer = hidden.view(torch.uint8).view(-1).numpy().data
            ends = np.cumsum(tokens * self._token_bytes).tolist()
            start = 0
            hashes = self._index["hash"][slots].tolist()
            for i, (slot, end, digest) in enumerate(zip(slots.tolist(), ends, hashes, strict=True)):
                part = buffer[start:end]
                whole = _read(file, part, self._start(slot))
                # What was read is hashed, and not what lies in the file: it is what will be used.
                if not whole or xxhash.xxh3_64_intdigest(part) != digest:
                    damaged.append(i)
                start = end
        if damaged:
            bad = np.zeros(len(places), dtype=np.bool_)
            bad[damaged] = True
            hidden = hidden[torch.from_numpy(np.repeat(~bad, tokens))]
            there[places[bad]] = False
        return FoundRows(self, keys, there, hidden, keys.rows[places[damaged]])

    def write(self, keys: RowKeys, *, hidden: Tensor, step: int) -> str | None:
        """Keep the hidden states of rows, [their tokens, width] one row after the other.

        A row that is not finite is not kept: it spoils the step that made it, and would spoil every
        later one that reads it.

        Returns:
            Why a row could not be written, or None. Neither it nor any later one is kept then.
        """
        if self._index is None or self._data is None or self._stopped:
            return None
        kept = hidden.to("cpu", self.dtype).contiguous()
        # A sum is finite only if all of its terms are, and quicker than to look at each.
        finite = kept.sum(dim=1, dtype=torch.float32).isfinite().numpy()
        values = kept.view(torch.uint8).view(-1)
        buffer = values.numpy().data
        file = self._data.fileno()
        ends = np.cumsum(keys.lengths * self._token_bytes)
        assert ends[-1] == len(values), "hidden states are not those of the rows"
        start = 0
        for slot, row, tokens, end in zip(
            self._slots_of(keys).tolist(), keys.rows, keys.lengths.tolist(), ends.tolist(),
            strict=True,
        ):  # fmt: skip
            first = start // self._token_bytes
            whole = bool(finite[first : first + tokens].all())
            if whole and slot < self.slots and tokens <= self.room[row]:
                part = buffer[start:end]
                if (problem := _written(file, part, self._start(slot))) is not None:
                    self._stopped = True
                    return problem
                self._index["hash"][slot] = xxhash.xxh3_64_intdigest(part)
                self._index["tokens"][slot] = tokens
                self._index["step"][slot] = step + 1  # last: now the row is there
            start = end
        return None

    def drop_from_memory(self) -> None:
        """Write what is pending to the disk and let the system forget what it keeps of the file."""
        if self._data is not None:
            os.fdatasync(self._data.fileno())
            os.posix_fadvise(self._data.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _open_shared(path: Path) -> IO[bytes]:
    """Open or make a file, and say that this process uses it, for as long as it is open."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        with contextlib.suppress(OSError):  # a file system without locks: nobody is told
            fcntl.flock(file, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # its last user has deleted it in between


def _is_last_user(file: IO[bytes]) -> bool:
    """Return whether no other process uses the file, which must not lose it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _written(file: int, part: memoryview, place: int) -> str | None:
    """Write `part` at `place`; return what went wrong: room was reserved, but disks fail."""
    try:
        done = os.pwrite(file, part, place)
    except OSError as error:
        return str(error)
    return None if done == len(part) else f"{done} of {len(part)} bytes written"


def _read(file: int, part: memoryview, place: int) -> bool:
    """Fill `part` from `place`; return whether all of it could be read."""
    try:
        return os.preadv(file, [part], place) == len(part)
    except OSError:
        return False
