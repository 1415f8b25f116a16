"""From a recipe file to a validated recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_ft.config import Recipe
from dist_ft.recipe.checks import check
from dist_ft.recipe.errors import Finding, RecipeError, as_lines, closest, show_value, unfilled
from dist_ft.recipe.overrides import apply_overrides
from dist_ft.recipe.packaged import packaged_recipes
from dist_ft.recipe.paths import resolve_paths
from dist_ft.recipe.reading import Document, read_yaml
from dist_ft.recipe.validate import validate


def load_recipe(
    path: str | Path, *, overrides: Sequence[str] = (), needs_files: bool = True
) -> Recipe:
    """Return the recipe of a file, or of a packaged recipe's bare name, checked completely.

    Relative paths in it become absolute: they start from the recipe file's folder, those of a
    packaged recipe from the current folder.

    Args:
        path: A YAML file or the name of a packaged recipe.
        overrides: ``dotted.path=value`` each, applied before validation.
        needs_files: Whether the model's weights and the data must be there; a plan needs neither.

    Raises:
        RecipeError: If anything is wrong; it holds one line for each error.
    """
    file, base = _find(path)
    try:
        document = read_yaml(file)
    except ValueError as error:
        raise RecipeError([str(error)]) from None
    raw = _mapping(document, file)
    findings = [Finding(place, text) for place, text in document.problems]
    findings += apply_overrides(raw, overrides)
    findings += unfilled(raw)
    draft = validate(raw)
    findings += draft.findings
    if draft.recipe is not None:
        draft.recipe = resolve_paths(draft.recipe, base=base)
        findings += check(draft, needs_files=needs_files)
    if findings or draft.recipe is None:
        raise RecipeError(as_lines(findings, raw))
    return draft.recipe


def _find(path: str | Path) -> tuple[Path, Path]:
    """Return the recipe file and the folder that its relative paths start from."""
    packaged = packaged_recipes()
    name = str(path)
    if name in packaged:
        return packaged[name], Path.cwd()
    file = Path(path).expanduser()
    is_bare = file.name == name and not file.suffix
    if is_bare and not file.exists():
        meant = closest(name, packaged)
        remedy = f"did you mean {meant}?" if meant else f"there are {', '.join(packaged)}"
        raise RecipeError([f"{name}: no such file or packaged recipe: {remedy}"])
    return file, file.resolve().parent


def _mapping(document: Document, file: Path) -> dict[str, Any]:
    if isinstance(document.value, dict):
        return document.value
    raise RecipeError(
        [
            f"{file}: must be `key: value` lines, got {show_value(document.value)}: "
            "start from one of `dist-ft recipes ls`"
        ]
    )
