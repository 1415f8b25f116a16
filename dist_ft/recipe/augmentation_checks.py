"""Whether a task's augmentation fits its type and the files that it names are there."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from dist_ft.config import (
    MentionReplacementConfig,
    Recipe,
    TaskConfig,
    WordDropoutConfig,
    WordReplacementConfig,
)
from dist_ft.recipe.errors import Finding, closest, show_value
from dist_ft.recipe.paths import exists
from dist_ft.recipe.reading import RawPath
from dist_ft.recipe.validate import Draft

LEXICONS = ("package:misspellings", "package:wordnet")


def check_augmentation(draft: Draft, recipe: Recipe) -> Iterator[Finding]:
    """Yield transforms that their task can't have, and word lists that aren't there."""
    augmented = any(task.augmentation for task in recipe.tasks)
    if recipe.cache.variants is not None and draft.is_sure("tasks") and not augmented:
        text = (
            f"repeats the augmentation, and no task has one, got {recipe.cache.variants}: "
            "remove it, or augment a task"
        )
        yield Finding(("cache", "variants"), text)
    for index, task in enumerate(recipe.tasks):
        yield from _check_segmentation(draft, task=task, index=index)
        for number, transform in enumerate(task.augmentation):
            path: RawPath = ("tasks", index, "augmentation", number)
            if not draft.is_sure(*path, "type"):
                continue
            if isinstance(transform, WordReplacementConfig) and draft.is_sure(*path, "lexicon"):
                yield from _check_lexicon(transform.lexicon, path=(*path, "lexicon"))
            if isinstance(transform, WordDropoutConfig) and draft.is_sure(*path, "placeholder"):
                yield from _check_placeholder(transform, path=(*path, "placeholder"))
            sure = draft.is_sure("tasks", index, "type")
            is_tagged = task.type == "token_classification"
            if isinstance(transform, MentionReplacementConfig) and sure and not is_tagged:
                text = (
                    "mention_replacement needs the tags of a token_classification, got "
                    f"{show_value(task.type)}: remove it"
                )
                yield Finding((*path, "type"), text)


def _check_segmentation(draft: Draft, *, task: TaskConfig, index: int) -> Iterator[Finding]:
    if task.segmentation == "characters" or not draft.is_sure("tasks", index):
        return
    path: RawPath = ("tasks", index, "segmentation")
    got = f"got {show_value(task.segmentation)}"
    if not task.augmentation:
        yield Finding(path, f"is what augmentation takes for words, and there is none, {got}: "
                      "remove it, or augment the task")  # fmt: skip
    elif find_spec(task.segmentation) is None:
        remedy = "pip install 'dist-ft[chinese]', or use characters"
        yield Finding(path, f"needs a package that is not installed, {got}: {remedy}")


def _check_lexicon(lexicon: str, *, path: RawPath) -> Iterator[Finding]:
    if lexicon.startswith("package:"):
        if lexicon not in LEXICONS:
            meant = closest(lexicon, LEXICONS)
            remedy = f"did you mean {meant}?" if meant else "use one of them"
            rule = f"must be a file, a folder, {' or '.join(LEXICONS)}"
            yield Finding(path, f"{rule}, got {show_value(lexicon)}: {remedy}")
    elif not lexicon or not exists(lexicon):
        yield Finding(path, f"no such file or folder, got {lexicon!r}: correct the path")


def _check_placeholder(transform: WordDropoutConfig, *, path: RawPath) -> Iterator[Finding]:
    if transform.placeholder is not None and not transform.placeholder.strip():
        yield Finding(path, f"must not be blank, got {transform.placeholder!r}: leave it out")
