"""Relative paths of a recipe made absolute."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from dist_ft.config import (
    CacheConfig,
    DataConfig,
    EngineConfig,
    Recipe,
    SourceConfig,
    TransformConfig,
    WordReplacementConfig,
)

_PREFIX = "package:"
_DATA_SUFFIXES = (".csv", ".json", ".jsonl", ".parquet", ".arrow")


def resolve_paths(recipe: Recipe, *, base: Path) -> Recipe:
    """Return the recipe with its relative paths made absolute.

    Hub ids and packaged sets stay as they are.

    Args:
        recipe: The recipe as written.
        base: The folder that relative paths start from.
    """
    tasks = [
        task.model_copy(
            update={
                "data": _resolve_data(task.data, base),
                "augmentation": [_resolve_lexicon(t, base) for t in task.augmentation],
            }
        )
        for task in recipe.tasks
    ]
    model = recipe.model
    if is_local(model.path, base=base):
        model = model.model_copy(update={"path": _absolute(model.path, base)})
    return recipe.model_copy(
        update={
            "output_dir": Path(_absolute(recipe.output_dir, base)),
            "data_dir": Path(_absolute(recipe.data_dir, base)),
            "engine": _resolve_engine(recipe.engine, base),
            "cache": _resolve_cache(recipe.cache, base),
            "model": model,
            "tasks": tasks,
        }
    )


def is_local(path: str, *, base: Path) -> bool:
    """Return whether a path means files of this machine and not a hub id or a packaged set."""
    if path.startswith(_PREFIX) or not path:
        return False
    looks_local = path.startswith((".", "/", "~")) or path.endswith(_DATA_SUFFIXES)
    return looks_local or glob.has_magic(path) or exists(_absolute(path, base))


def exists(path: str) -> bool:
    """Return whether there is a file or folder; False too for what can't be a path."""
    return os.path.exists(path)  # noqa: PTH110 (Path.exists raises for a name that is too long)


def _absolute(path: str | Path, base: Path) -> str:
    # Not Path.resolve: a link in the path is the user's choice of a name.
    return os.path.normpath(base / Path(path).expanduser())


def _resolve_engine(engine: EngineConfig, base: Path) -> EngineConfig:
    if engine.deepspeed is None:
        return engine
    return engine.model_copy(update={"deepspeed": Path(_absolute(engine.deepspeed, base))})


def _resolve_cache(cache: CacheConfig, base: Path) -> CacheConfig:
    if cache.dir is None:
        return cache
    return cache.model_copy(update={"dir": Path(_absolute(cache.dir, base))})


def _resolve_lexicon(transform: TransformConfig, base: Path) -> TransformConfig:
    is_file = isinstance(transform, WordReplacementConfig) and transform.lexicon
    if not is_file or is_file.startswith(_PREFIX):
        return transform
    return transform.model_copy(update={"lexicon": _absolute(is_file, base)})


def _resolve_data(data: DataConfig, base: Path) -> DataConfig:
    changed: dict[str, SourceConfig] = {}
    for key in ("train", "validation", "test"):
        source = getattr(data, key)
        if isinstance(source, SourceConfig) and is_local(source.path, base=base):
            path = _absolute(source.path, base)
            changed[key] = source.model_copy(update={"path": path})
    return data.model_copy(update=changed)
