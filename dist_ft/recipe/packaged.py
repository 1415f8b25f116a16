"""The recipes that come with dist_ft."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parents[1] / "recipes"


def packaged_recipes() -> dict[str, Path]:
    """Return the packaged recipes: bare name to file."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}
