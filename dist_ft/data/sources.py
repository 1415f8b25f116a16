"""Raw sources: packaged sets, files and folders, hub data sets, all read as streams of rows."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NoReturn

from dist_ft.data.files import (
    FORMATS,
    SUFFIXES,
    BadRow,
    OnBadRow,
    Row,
    estimate_rows,
    read_rows,
    refusal,
)
from dist_ft.data.packaged import PACKAGED, PackagedSet
from dist_ft.data.places import find_places

_PACKAGE_PREFIX = "package:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class SourceSpec:
    """Where raw rows come from.

    Attributes:
        path: "package:<set>", a file, a glob, a folder, or the id of a hub data set.
        format: csv, json, jsonl, parquet or arrow; by default the file's suffix decides.
        subset: hub data sets only: the configuration.
        split: hub data sets only: the split to read, "train" by default.
        revision: hub data sets only: commit, tag or branch.
    """

    path: str
    format: str | None = None
    subset: str | None = None
    split: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class RawSource:
    """A stream of raw rows that can be read any number of times.

    Attributes:
        name: what error messages call it.
        read: yields the rows; called with what to do about a row that can't be read.
        identify: returns the fingerprint.
        estimate: returns about how many rows there are, None if nobody knows.
        find: returns where rows are, by their numbers from 0; None where all that is known is
            their number.
    """

    name: str
    read: Callable[[OnBadRow], Iterator[Row]]
    identify: Callable[[], dict[str, Any]]
    estimate: Callable[[], int | None] = lambda: None
    find: Callable[[Collection[int]], dict[int, str]] | None = None

    def places(self, rows: Collection[int]) -> dict[int, str]:
        """Returns where rows are, in words, by their numbers from 0."""
        if self.find is not None:
            return self.find(rows)
        return {row: f"{self.name}, row {row + 1}" for row in rows}

    def rows(self, *, on_bad_row: OnBadRow | None = None) -> Iterator[Row]:
        """Yields the rows in order, a dict from column to value each.

        Args:
            on_bad_row: called with each row that can't be read, which is then left out; by default
                such a row raises ValueError.

        Raises:
            ValueError: the source can't be read or holds no rows.
        """
        empty = True
        for row in self.read(on_bad_row or _refuse):
            empty = False
            yield row
        if empty:
            raise ValueError(f"{self.name} holds no rows: give a source with data")

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns of the first row that can be read."""
        bad: list[BadRow] = []
        for row in self.read(bad.append):
            return tuple(row)
        why = f" that can be read (the first: {bad[0]})" if bad else ""
        raise ValueError(f"{self.name} holds no rows{why}: give a source with data")

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Hashes of files, version of a package or revision of a hub data set.

        It names no folder, so it is the same on every machine.
        """
        return self.identify()

    def require(self, columns: Sequence[str]) -> None:
        """Checks that the columns exist.

        Raises:
            ValueError: a column is absent, naming the columns there are.
        """
        missing = [column for column in columns if column not in self.columns]
        if missing:
            raise ValueError(
                f"{self.name} has no column {', '.join(map(repr, missing))}: it has "
                f"{', '.join(map(repr, self.columns))}; name one of them in the task"
            )


def open_source(spec: SourceSpec, *, base_dir: Path) -> RawSource:
    """Returns the source of a spec; nothing but the existence of the files is checked yet.

    Args:
        spec: where the rows come from.
        base_dir: the folder that relative paths start from, usually the recipe's.

    Raises:
        ValueError: the set is unknown, a file is missing, or the format can't be told.
        RuntimeError: the package of a packaged set is not installed.
    """
    if spec.path.startswith(_PACKAGE_PREFIX):
        return _packaged_source(spec)
    files = _find_files(spec.path, base_dir=base_dir)
    if files:
        _refuse_hub_options(spec)
        return _file_source(spec, files=files)
    if _HUB_ID.fullmatch(spec.path) and Path(spec.path).suffix not in SUFFIXES:
        return _hub_source(spec)
    raise ValueError(
        f"source {spec.path!r} {_no_file(spec.path, base_dir)}: give a file, a folder, a glob, "
        f"'{_PACKAGE_PREFIX}<set>' or the id of a hub data set; relative paths start from the "
        "recipe's folder"
    )


def _refuse(row: BadRow) -> NoReturn:
    raise ValueError(refusal(str(row)))


def _refuse_hub_options(spec: SourceSpec) -> None:
    given = [name for name in ("subset", "split", "revision") if getattr(spec, name) is not None]
    if given:
        raise ValueError(
            f"source {spec.path!r} has {', '.join(given)}, which only hub data sets have: remove it"
        )


def _packaged_source(spec: SourceSpec) -> RawSource:
    _refuse_hub_options(spec)
    name = spec.path.removeprefix(_PACKAGE_PREFIX)
    if name not in PACKAGED:
        raise ValueError(
            f"packaged set {name!r} is unknown: choose one of {', '.join(sorted(PACKAGED))}"
        )
    packaged: PackagedSet = PACKAGED[name]
    path = packaged.path()

    def identify() -> dict[str, Any]:
        return {
            "kind": "package",
            "set": name,
            "package": packaged.package,
            "version": packaged.installed_version(),
            "files": [_file_fingerprint(path, name=packaged.file)],
        }

    return RawSource(spec.path, lambda _: packaged.read(path), identify)


def _find_files(path: str, *, base_dir: Path) -> list[Path]:
    place = base_dir / Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        files = sorted(p for p in place.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
        if not files:
            raise ValueError(
                f"folder {place} holds no data files ({', '.join(sorted(SUFFIXES))}): "
                "give another folder or a glob with a format"
            )
        return files
    if glob.has_magic(path):
        # Path.glob takes no absolute pattern.
        found = map(Path, glob.glob(str(place), recursive=True))  # noqa: PTH207
        files = sorted(path for path in found if path.is_file())
        if not files:
            raise ValueError(f"the glob {path!r} {_no_file(path, base_dir)}: correct it")
        return files
    return []


def _no_file(path: str, base_dir: Path) -> str:
    is_absolute = Path(path).expanduser().is_absolute()
    return "matches no file" if is_absolute else f"matches no file in {base_dir}"


def _file_source(spec: SourceSpec, *, files: list[Path]) -> RawSource:
    if spec.format is not None and spec.format not in FORMATS:
        raise ValueError(f"format {spec.format!r} is unknown: choose one of {', '.join(FORMATS)}")
    formats = {spec.format or SUFFIXES.get(path.suffix, "") for path in files}
    if "" in formats:
        odd = next(path for path in files if path.suffix not in SUFFIXES)
        raise ValueError(
            f"the format of {odd} can't be told from its suffix {odd.suffix!r}: set the source's "
            f"format to one of {', '.join(FORMATS)}"
        )
    if len(formats) > 1:
        raise ValueError(
            f"source {spec.path!r} mixes the formats {', '.join(sorted(formats))}: give a glob "
            "that selects one of them"
        )
    (file_format,) = formats

    def read(on_bad_row: OnBadRow) -> Iterator[Row]:
        for path in files:
            yield from read_rows(path, file_format=file_format, on_bad_row=on_bad_row)

    def identify() -> dict[str, Any]:
        return {
            "kind": "files",
            "format": file_format,
            "files": [_file_fingerprint(path, name=path.name) for path in files],
        }

    def estimate() -> int | None:
        found = [estimate_rows(path, file_format=file_format) for path in files]
        return None if None in found else sum(rows or 0 for rows in found)

    def find(rows: Collection[int]) -> dict[int, str]:
        return find_places(files, file_format=file_format, rows=rows, name=spec.path)

    return RawSource(spec.path, read, identify, estimate, find)


def _file_fingerprint(path: Path, *, name: str) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": name, "bytes": path.stat().st_size, "sha256": digest}


def _hub_source(spec: SourceSpec) -> RawSource:
    if spec.format is not None:
        raise ValueError(
            f"source {spec.path!r} matches no file, and a hub data set has no format: correct the "
            "path, or remove format"
        )

    def read(_: OnBadRow) -> Iterator[Row]:
        import datasets

        try:
            stream = datasets.load_dataset(
                spec.path,
                spec.subset,
                split=spec.split or "train",
                revision=_hub_commit(spec.path, spec.revision),
                streaming=True,
            )
            # Images and sounds as they are stored: an object made of one differs each time.
            stream = stream.decode(False)
            decode = label_decoder(stream.features or {})
            yield from (decode(row) for row in stream)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"source {spec.path!r} matches no file and can't be read as a hub data set "
                f"({error}): correct the path, subset, split or revision, or check the network"
            ) from error

    def identify() -> dict[str, Any]:
        return {
            "kind": "hub",
            "id": spec.path,
            "subset": spec.subset,
            "split": spec.split or "train",
            "revision": _hub_revision(spec),
        }

    return RawSource(spec.path, read, identify)


def _hub_revision(spec: SourceSpec) -> str:
    try:
        return _hub_commit(spec.path, spec.revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the revision of hub data set {spec.path!r} can't be looked up ({error}): check the "
            "id, the revision and the network"
        ) from error


@cache
def _hub_commit(path: str, revision: str | None) -> str:
    """Returns the commit behind a revision, the same one for the life of this process.

    A branch moves: the rows of each pass and the fingerprint must be of one commit.
    """
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().dataset_info(path, revision=revision)
    except (OSError, ValueError):
        raise
    except Exception as error:  # of the hub's HTTP library, which has changed before
        raise ConnectionError(str(error)) from error
    return str(info.sha)


def label_decoder(features: Any) -> Callable[[Row], Row]:
    """Returns a function that replaces the class numbers of a hub data set's row by their names.

    Args:
        features: the `datasets.Features` of the data set; may be empty. A number outside of the
            names (-1 marks rows without a label) becomes None.
    """
    import datasets

    names: dict[str, list[str]] = {}
    for column, feature in features.items():
        inner = feature
        while (nested := getattr(inner, "feature", None)) is not None:
            inner = nested
        if isinstance(inner, datasets.ClassLabel):
            names[column] = list(inner.names)

    def decode(row: Row) -> Row:
        return {
            key: _named(value, names=names[key]) if key in names else value
            for key, value in row.items()
        }

    return decode


def _named(value: Any, *, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_named(item, names=names) for item in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None
