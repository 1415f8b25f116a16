"""Which tasks' frozen prefixes are worth keeping."""

from pathlib import Path
from typing import Any

import pytest

from dist_ft.recipe import load_recipe
from dist_ft.train.parts import make_parts
from dist_ft.train.trunk_passes import cached_task, row_visits
from tests.helpers.tiny_run import write_recipe

EVERY = {"text", "tags", "spans"}
DEPTH = "freezing={policy: static, depth: 2}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny recipe: three tasks of about 50 rows in turn, 8 rows a step."""
    return write_recipe(tmp_path_factory.mktemp("passes"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # 24 steps: 64 rows of each task, of 46 to 50.
        ([DEPTH], EVERY),
        ([DEPTH, "train.max_duration=20step"], set()),
        ([DEPTH, "train.max_duration=20step", "cache.policy=on"], EVERY),
        # Two thirds of the steps have frozen blocks.
        (["train.max_duration=30step"], set()),
        (["train.max_duration=40step"], EVERY),
        ([DEPTH, "mixture={policy: fixed, weights: {text: 6, tags: 1, spans: 1}}"], {"text"}),
        ([DEPTH, "mixture={policy: bandit}"], EVERY),
    ],
)
def test_rows_must_come_again(recipe: Path, overrides: list[str], expected: Any) -> None:
    loaded = load_recipe(recipe, overrides=overrides)
    assert row_visits(loaded, make_parts(loaded, lambda _: None)).keys() == expected


def test_rows_of_other_words_under_the_same_path_are_others(recipe: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    listed = f"tasks.text.augmentation=[{{type: word_replacement, lexicon: {words}}}]"
    found: list[str] = []
    for line in ("good, nice", "good, fine", "good, nice"):
        words.write_text(f"{line}\n")
        loaded = load_recipe(recipe, overrides=[DEPTH, listed, "cache.variants=2"])
        text = make_parts(loaded, lambda _: None).tasks[0]
        found.append(cached_task(loaded.tasks[0], text, loaded).data)
    assert found[0] == found[2] != found[1]
