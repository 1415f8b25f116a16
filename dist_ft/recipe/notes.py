"""What `check` cannot tell without the hub, and says instead of passing over it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dist_ft.config import Recipe, SourceConfig
from dist_ft.model.sources import PREFIX


def hub_notes(recipe: Recipe) -> Iterator[str]:
    """Yield a line for each path of a loaded recipe that is taken as a hub id.

    A misspelt folder looks like one, and nothing but the hub can tell.
    """
    places = {"model.path": recipe.model.path}
    for task in recipe.tasks:
        for split in ("train", "validation", "test"):
            source = getattr(task.data, split)
            if isinstance(source, SourceConfig):
                places[f"tasks.{task.name}.data.{split}"] = source.path
    for place, path in places.items():
        # Paths of files are absolute in a loaded recipe.
        if not path.startswith(PREFIX) and not Path(path).is_absolute():
            yield f"{place}: {path!r} is no file or folder here: taken as a hub id, not checked"
