"""Whatever a recipe holds, it is read or refused with lines that a person can read."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft.config import Recipe
from dist_ft.recipe import RecipeError, load_recipe, packaged_recipes

GOOD = yaml.safe_load(packaged_recipes()["quickstart"].read_text())
JUNK = st.sampled_from(
    [
        *(None, True, -1, 0, 3, 2.5, "x", "", "3ep", "1e400step", 1e308, 10**30, "é" * 300),
        *([], {}, [1], {"a": 1}, ["a", "a"], [{}], "a\nb", "/nonexistent", "a/b/c", {"path": 3}),
        *({"type": "generation"}, {"policy": "plateau"}, "package:trec", "package:", "[", "..."),
        {"policy": "explicit", "phases": [{"at": "3ep"}, {}]},
        {"policy": "static", "depth": 3, "frozen": ["x"]},
    ]
)
KEYS = st.sampled_from(
    ["type", "policy", "name", "path", "every", "at", "labels", "problem", "zzz"]
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return []
    found = []
    for key, inner in value.items():
        found += [(*path, key), *_places(inner, (*path, key))]
    return found


def _errors_of(content: bytes) -> list[str]:
    """Return the lines of the error, [] if the recipe is good."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "changed.yaml"
        file.write_bytes(content)
        try:
            recipe = load_recipe(file)
        except RecipeError as error:
            return error.errors or ["an error without a line"]
        assert isinstance(recipe, Recipe)
        return []


@st.composite
def broken_recipes(draw: st.DrawFn) -> dict[str, Any]:
    """Return the quickstart recipe with one to four changes."""
    raw = copy.deepcopy(GOOD)
    for _ in range(draw(st.integers(1, 4))):
        *parents, key = draw(st.sampled_from(_places(raw)))
        section: Any = raw
        for parent in parents:
            section = section[parent]
        change = draw(st.sampled_from(["replace", "delete", "add"]))
        if change == "delete" and len(raw) > 1:
            del section[key]
        elif change == "add" and isinstance(section, dict):
            section[draw(KEYS)] = copy.deepcopy(draw(JUNK))
        else:
            section[key] = copy.deepcopy(draw(JUNK))
    return raw


@settings(max_examples=150, deadline=None)
@given(broken_recipes())
def test_a_changed_recipe_is_read_or_refused_in_lines(raw: dict[str, Any]) -> None:
    lines = _errors_of(yaml.safe_dump(raw).encode())
    assert len(set(lines)) == len(lines)
    for line in lines:
        assert ": " in line
        assert line == line.strip()
        assert "\n" not in line
        # pydantic's own words would name its types and links.
        assert "pydantic" not in line
        assert "Value error" not in line


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_refused_in_lines(text: str) -> None:
    lines = _errors_of(text.encode("utf-8", "replace"))
    assert lines
    assert all("\n" not in line for line in lines)
