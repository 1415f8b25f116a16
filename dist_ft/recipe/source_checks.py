"""Whether the data that a recipe names are there and have the columns that its tasks read."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dist_ft.config import Recipe, SourceConfig, TaskConfig
from dist_ft.recipe.errors import Finding, closest, show_value
from dist_ft.recipe.paths import exists
from dist_ft.recipe.reading import RawPath
from dist_ft.recipe.validate import Draft

if TYPE_CHECKING:
    from dist_ft.data.sources import RawSource

# Keys of a task that name a column of its source.
_COLUMN_KEYS: dict[str, tuple[str, ...]] = {
    "text_classification": ("text", "text_pair", "label"),
    "token_classification": ("tokens", "tags"),
    "question_answering": ("question", "context", "answers"),
    "image_classification": ("image", "label"),
    "audio_classification": ("audio", "label"),
    "generation": ("prompt", "context", "response"),
}
_PACKAGE_PREFIX = "package:"


def named_columns(task: TaskConfig) -> Iterator[tuple[str, str]]:
    """Yield a task's keys of columns, and what they name: all must be in a source."""
    keys = _COLUMN_KEYS[task.type]
    if getattr(task, "messages", None) is not None:  # in the place of prompt and response
        keys = ("messages",)
    yield from ((key, column) for key in keys if (column := getattr(task, key)) is not None)


def check_sources(draft: Draft, recipe: Recipe) -> Iterator[Finding]:
    """Yield a finding for each source that is missing, empty or lacks a column.

    Hub data sets are not looked up: that is for ``prepare``.
    """
    for index, task in enumerate(recipe.tasks):
        for split in ("train", "validation", "test"):
            path: RawPath = ("tasks", index, "data", split)
            source = getattr(task.data, split)
            if isinstance(source, SourceConfig) and draft.is_sure(*path):
                yield from _check_source(draft, task=task, source=source, path=path)


def _check_source(
    draft: Draft, *, task: TaskConfig, source: SourceConfig, path: RawPath
) -> Iterator[Finding]:
    # Read with pyarrow: imported only when there is a source to look at.
    from dist_ft.data.packaged import PACKAGED
    from dist_ft.data.sources import SourceSpec, open_source

    packaged = source.path.startswith(_PACKAGE_PREFIX)
    local = Path(source.path).is_absolute()
    if not source.path or (local and not glob.has_magic(source.path) and not exists(source.path)):
        yield Finding(
            path,
            f"no such file or folder, got {source.path!r}: correct it (relative "
            "paths start from the recipe's folder)",
        )
        return
    if packaged and source.path.removeprefix(_PACKAGE_PREFIX) not in PACKAGED:
        yield Finding(path, _unknown_set(source.path, known=PACKAGED))
        return
    try:
        raw = open_source(SourceSpec(**source.model_dump()), base_dir=Path.cwd())
        columns = raw.columns if packaged or local else None
    except (ValueError, RuntimeError, OSError) as error:
        yield Finding(path, str(error))
        return
    if columns is not None and len(columns) == 1 and any(s in columns[0] for s in ";\t"):
        yield Finding(
            path,
            f"has one column, {columns[0]!r}: its columns are separated by something else than "
            "commas: save it with commas",
        )
        return
    if columns is not None and draft.is_sure("tasks", path[1], "type"):
        yield from _missing_columns(draft, task=task, source=raw, index=path[1])


def _missing_columns(
    draft: Draft, *, task: TaskConfig, source: RawSource, index: str | int
) -> Iterator[Finding]:
    for key, column in named_columns(task):
        if column in source.columns or not draft.is_sure("tasks", index, key):
            continue
        # In quotes: a blank before or behind a name would not be seen.
        known = ", ".join(map(repr, source.columns))
        meant = closest(column, source.columns)
        remedy = f"did you mean {meant!r}?" if meant else "name one of them"
        text = f"must be a column of {source.name} ({known}), got {show_value(column)}: {remedy}"
        yield Finding(("tasks", index, key), text)


def _unknown_set(path: str, *, known: Iterable[str]) -> str:
    names = [_PACKAGE_PREFIX + name for name in sorted(known)]
    meant = closest(path, names)
    remedy = f"did you mean {meant}?" if meant else f"use one of {', '.join(names)}"
    return f"must be a packaged set, got {show_value(path)}: {remedy}"
