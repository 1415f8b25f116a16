"""Which raw rows belong to a split: deduplicated, without leaks, as a pure function of the rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from dist_ft.data.bad_rows import BadRows
from dist_ft.data.files import BadRow, Row
from dist_ft.data.sources import RawSource, SourceSpec, open_source
from dist_ft.wording import counted

SPLITS = ("train", "validation", "test")
BATCH_ROWS = 1000
# A batch ends early after this much text, and a longer text than that is a mistake, such as a lost
# quotation mark: while they encode, tokenizers take about 150 bytes for each character.
_BATCH_CHARACTERS = 2**20
_MOST_CHARACTERS = 2 * 2**20
# What a task's functions raise for a row whose values have unexpected types.
BAD_ROW_ERRORS = (ValueError, TypeError, KeyError, AttributeError)

_Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class SplitPlan:
    """Where each split comes from.

    Attributes:
        sources: each split's raw rows; "train" is needed.
        base_dir: the folder that relative source paths start from.
        fractions: splits which are cut from the train source, with their shares; a row's split
            depends on its split key only.

    Raises:
        ValueError: a split is unknown, has both or no train source, or the fractions are not
            between 0 and 1.
    """

    sources: Mapping[str, SourceSpec]
    base_dir: Path
    fractions: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for split in (*self.sources, *self.fractions):
            if split not in SPLITS:
                raise ValueError(f"split {split!r} is unknown: choose from {', '.join(SPLITS)}")
        if "train" not in self.sources:
            raise ValueError("the split 'train' has no source: give one")
        if both := sorted(set(self.sources) & set(self.fractions)):
            raise ValueError(f"the splits {both} have a source and a fraction: give one of them")
        if not all(0 < share < 1 for share in self.fractions.values()) or (
            sum(self.fractions.values()) >= 1
        ):
            raise ValueError(
                f"the fractions {dict(self.fractions)} must lie between 0 and 1 and leave rows for "
                "train: make them smaller"
            )

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that there are, train first."""
        return tuple(s for s in SPLITS if s in self.sources or s in self.fractions)

    def source_of(self, split: str) -> RawSource:
        """Returns the source that a split's rows come from.

        Raises:
            ValueError: there is no such split, or the source can't be found.
        """
        if split not in self.splits:
            raise ValueError(f"there is no split {split!r}, only {', '.join(self.splits)}")
        return open_source(self.sources[self._origin(split)], base_dir=self.base_dir)

    def held_out(self, split: str) -> tuple[str, ...]:
        """Returns the splits with a source of their own whose keys must not occur in `split`."""
        if self._origin(split) != "train":
            return ()
        return tuple(s for s in SPLITS if s != "train" and s in self.sources)

    def split_of(self, keys: Sequence[str]) -> list[str]:
        """Returns the split of each split key among those cut from the train source."""
        # Laid out from the top of [0, 1), test first: a larger validation share moves rows from
        # train to validation and leaves the others where they were.
        shares = [(s, self.fractions[s]) for s in reversed(SPLITS) if s in self.fractions]
        splits = []
        for key in keys:
            place = 1 - _hash(f"split|{key}") / 2**64
            for split, share in shares:
                place -= share
                if place <= 0:
                    splits.append(split)
                    break
            else:
                splits.append("train")
        return splits

    def _origin(self, split: str) -> str:
        return split if split in self.sources else "train"


@dataclass(frozen=True)
class RowFunctions:
    """What a task knows about its raw rows.

    Attributes:
        schema: the task's columns, without the base columns.
        required_columns: columns of the raw rows which must not be null, NaN, blank text or text
            beyond all measure.
        split_key: rows with one split key never lie in two splits (QA: the passage).
        dedupe_key: of several rows with one dedupe key only the first is kept.
        encode: raw rows -> features. A raw row also has "source_row", its number in the source; a
            feature has input_ids, loss_count, source_row, the task's columns, and, if it lost
            tokens, how many under "truncated_tokens". Raises ValueError for a row it can't encode.
        rows_at_once: rows that are encoded together, so that what they become fits into memory.
        named_columns: columns that a source must have, though a row's value may be null.
        check: raises ValueError for a row that `encode` would refuse, before its keys shadow those
            of a good one.
    """

    schema: Any
    required_columns: tuple[str, ...]
    split_key: Callable[[Row], str]
    dedupe_key: Callable[[Row], str]
    encode: Callable[[list[Row]], Sequence[dict[str, Any]]]
    rows_at_once: int = BATCH_ROWS
    named_columns: tuple[str, ...] = ()
    check: Callable[[Row], None] | None = None


@dataclass
class SelectionCounts:
    """What became of the raw rows; `read` is the sum of all others.

    Attributes:
        read: raw rows read.
        invalid: skipped because they have no valid content.
        other_split: belong to another split of the same source.
        leaking: have a key which occurs in an evaluation split.
        duplicates: have the dedupe key of an earlier row.
        kept: went into the split.
    """

    read: int = 0
    invalid: int = 0
    other_split: int = 0
    leaking: int = 0
    duplicates: int = 0
    kept: int = 0

    def to_json(self) -> dict[str, int]:
        """Returns the counts by name."""
        return asdict(self)

    def __str__(self) -> str:
        """Returns the counts in words, such as "3 rows read, 3 in another split"."""
        words = {
            "invalid": "that can't be used",
            "other_split": "in another split",
            "leaking": "that an evaluation split has, too",
            "duplicates": "repeated",
            "kept": "kept",
        }
        found = [
            f"{getattr(self, name)} {what}" for name, what in words.items() if getattr(self, name)
        ]
        return ", ".join([f"{counted(self.read, 'row')} read", *found])


class KeySet:
    """A growing set of 64-bit keys at 8 bytes each: sorted arrays, merged when sizes are close.

    Two different texts share a key with a chance of about n^2 / 2^65, 3e-6 for ten million rows.
    """

    def __init__(self) -> None:
        self._levels: list[_Keys] = []

    def add(self, keys: _Keys) -> npt.NDArray[np.bool_]:
        """Adds keys and returns which were new, bool [n]; of equal ones the first counts."""
        first = np.zeros(len(keys), dtype=np.bool_)
        first[np.unique(keys, return_index=True)[1]] = True
        new = first & ~self.contains(keys)
        level = np.sort(keys[new])
        while self._levels and len(self._levels[-1]) <= 2 * len(level):
            level = np.sort(np.concatenate([self._levels.pop(), level]))
        if len(level):
            self._levels.append(level)
        return new

    def contains(self, keys: _Keys) -> npt.NDArray[np.bool_]:
        """Returns which keys are in the set, bool [n]."""
        found = np.zeros(len(keys), dtype=np.bool_)
        for level in self._levels:
            place = np.minimum(np.searchsorted(level, keys), len(level) - 1)
            found |= level[place] == keys
        return found

    def __len__(self) -> int:
        return sum(len(level) for level in self._levels)


def select_rows(
    plan: SplitPlan,
    *,
    split: str,
    functions: RowFunctions,
    bad_rows: BadRows,
    counts: SelectionCounts | None = None,
) -> Iterator[list[Row]]:
    """Yields a split's raw rows in batches, deduplicated and free of leaks, in the source's order.

    Args:
        plan: where the splits come from.
        split: the split wanted.
        functions: the task's keys and required columns.
        bad_rows: what to do about rows without valid content. Of a source that is cut into splits
            they belong to the split that has its name.
        counts: is brought up to date with each batch.

    Yields:
        Lists of at most about 1,000 rows (also empty ones, so that progress is seen); each row is
        a copy with its number in the source under "source_row".

    Raises:
        ValueError: a source or column is absent, or a row is bad and not skipped.
    """
    counts = counts if counts is not None else SelectionCounts()
    source = plan.source_of(split)
    source.require((*functions.required_columns, *functions.named_columns))
    forbidden = _keys_of(plan, splits=plan.held_out(split), functions=functions)
    seen = KeySet()
    is_own = split in plan.sources
    refusing = bad_rows if is_own else bad_rows.of_another_split()
    for batch in _valid_batches(source, functions=functions, bad_rows=refusing):
        keep = np.ones(len(batch.rows), dtype=np.bool_)
        if split not in plan.sources or (split == "train" and plan.fractions):
            keep = np.array([s == split for s in plan.split_of(batch.split_keys)], dtype=np.bool_)
        leaking = keep & (
            forbidden.contains(batch.split_hashes) | forbidden.contains(batch.dedupe_hashes)
        )
        candidates = np.flatnonzero(keep & ~leaking)
        places = candidates[seen.add(batch.dedupe_hashes[candidates])]
        counts.read += batch.read
        counts.invalid = bad_rows.count
        counts.other_split += int((~keep).sum()) + (0 if is_own else batch.read - len(keep))
        counts.leaking += int(leaking.sum())
        counts.duplicates += len(candidates) - len(places)
        counts.kept += len(places)
        yield [batch.rows[place] for place in places]


def _keys_of(plan: SplitPlan, *, splits: Sequence[str], functions: RowFunctions) -> KeySet:
    """Returns the split and dedupe keys of whole splits."""
    keys = KeySet()
    for split in splits:
        source = plan.source_of(split)
        source.require(functions.required_columns)
        # Bad rows are dealt with when that split itself is prepared.
        skip = BadRows(source, skip=True)
        for batch in _valid_batches(source, functions=functions, bad_rows=skip):
            keys.add(batch.split_hashes)
            keys.add(batch.dedupe_hashes)
    return keys


@dataclass
class _Batch:
    """The valid rows of a piece of a source, their keys, and how many raw rows were read."""

    read: int = 0
    rows: list[Row] = field(default_factory=list)
    split_keys: list[str] = field(default_factory=list)
    dedupe_keys: list[str] = field(default_factory=list)

    @property
    def split_hashes(self) -> _Keys:
        return _hashes(self.split_keys)

    @property
    def dedupe_hashes(self) -> _Keys:
        return _hashes(self.dedupe_keys)


def _valid_batches(
    source: RawSource, *, functions: RowFunctions, bad_rows: BadRows
) -> Iterator[_Batch]:
    unreadable = 0

    def on_bad_row(row: BadRow) -> None:
        nonlocal unreadable
        bad_rows.unreadable(row)
        unreadable += 1

    numbered = enumerate(source.rows(on_bad_row=on_bad_row))
    for piece in _pieces(numbered, most=functions.rows_at_once):
        batch = _Batch(read=len(piece) + unreadable)
        unreadable = 0
        for number, row in piece:
            try:
                _add_row(batch, row={**row, "source_row": number}, functions=functions)
            except BAD_ROW_ERRORS as error:
                bad_rows.refused(number, str(error), cause=error)
        yield batch
    if unreadable:
        yield _Batch(read=unreadable)


def _pieces(rows: Iterable[tuple[int, Row]], *, most: int) -> Iterator[list[tuple[int, Row]]]:
    """Yields the rows in pieces which are neither long nor large."""
    piece: list[tuple[int, Row]] = []
    size = 0
    for number, row in rows:
        piece.append((number, row))
        size += sum(map(_characters, row.values()))
        if len(piece) == most or size >= _BATCH_CHARACTERS:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _add_row(batch: _Batch, *, row: Row, functions: RowFunctions) -> None:
    if problem := _problem(row, required=functions.required_columns):
        raise ValueError(problem)
    if functions.check is not None:
        functions.check(row)
    split_key, dedupe_key = functions.split_key(row), functions.dedupe_key(row)
    if not isinstance(split_key, str) or not isinstance(dedupe_key, str):
        raise TypeError(f"split and dedupe keys must be text, got {split_key!r}, {dedupe_key!r}")
    batch.rows.append(row)
    batch.split_keys.append(split_key)
    batch.dedupe_keys.append(dedupe_key)


def _problem(row: Row, *, required: Sequence[str]) -> str | None:
    for column in required:
        value = row.get(column)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return f"column {column!r} is null"
        if isinstance(value, str) and not value.strip():
            return f"column {column!r} is blank"
        if (place := _surrogate(value)) is not None:
            return f"column {column!r} is no valid text (a lone surrogate at character {place})"
        if (size := _characters(value)) > _MOST_CHARACTERS:
            return (
                f"column {column!r} has {size:,} characters, more than {_MOST_CHARACTERS:,}: "
                "split the text"
            )
    return None


def _surrogate(value: Any) -> int | None:
    """Returns where a text has half a character, which JSON can hold but UTF-8 can't."""
    if isinstance(value, list):
        return next((p for p in map(_surrogate, value) if p is not None), None)
    if not isinstance(value, str) or value.isascii():
        return None
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def _hash(text: str) -> int:
    # A column that isn't required may be no valid text.
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def _hashes(texts: Sequence[str]) -> _Keys:
    return np.array([_hash(text) for text in texts], dtype=np.uint64)
