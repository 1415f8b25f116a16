"""What `dist-ft prepare` and `dist-ft data` do and say about prepared data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dist_ft.config import Recipe
from dist_ft.data.augment.augmenter import Changes
from dist_ft.data.augmented import AugmentedReader
from dist_ft.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from dist_ft.data.prepare import split_folder
from dist_ft.data.shards import verify
from dist_ft.train.augmentation import make_augmentation
from dist_ft.train.console import Console
from dist_ft.train.data import PreparedTask, Say, prepare_tasks, split_plan
from dist_ft.train.loading import make_loader, plan_steps
from dist_ft.train.parts import load_preprocessor

_BINS = 12
_BAR = 40


def prepare(recipe: Recipe, *, replace: bool = False) -> None:
    """Turn the recipe's data into shards, saying what becomes of each split.

    Args:
        recipe: A loaded recipe.
        replace: Write shards anew that were made with another tokenizer, too.
    """
    console = Console(main=True)
    prepare_tasks(
        recipe,
        tokenizer=load_preprocessor(recipe),
        say=console.say,
        reading=console.reading,
        replacing="anything" if replace else "settings",
    )


def verify_splits(recipe: Recipe) -> Iterator[tuple[str, str | None]]:
    """Yield each prepared split, ``task/split``, with what is wrong with it; None if nothing is."""
    for name, folder in _folders(recipe):
        try:
            _check_prepared(folder)
            # Ids are compared with the vocabulary of the tokenizer that made them.
            size = read_manifest(folder).tokenizer.get("vocab_size")
            verify(folder, vocab_size=size)
        except ValueError as error:
            yield name, str(error)
        else:
            yield name, None


def describe_splits(recipe: Recipe) -> Iterator[str]:
    """Yield lines about every prepared split.

    Raises:
        ValueError: If a split is not prepared, or its manifest is damaged.
    """
    for name, folder in _folders(recipe):
        _check_prepared(folder)
        yield from _describe_split(name, read_manifest(folder))


def _folders(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    for config in recipe.tasks:
        for split in split_plan(config).splits:
            folder = split_folder(recipe.data_dir, task=config.name, split=split)
            yield f"{config.name}/{split}", folder


def _check_prepared(folder: Path) -> None:
    if not (folder / MANIFEST_NAME).is_file():
        raise ValueError(f"{folder} holds no prepared data: run dist-ft prepare with this recipe")


def _describe_split(name: str, manifest: Manifest) -> Iterator[str]:
    mean = manifest.tokens / manifest.rows
    yield f"{name}: {manifest.rows:,} rows, {manifest.tokens:,} tokens"
    yield f"  length: {manifest.min_length} to {manifest.max_length} tokens, mean {mean:.1f}"
    cut = manifest.preprocessing["rows_truncated"]
    dropped = manifest.preprocessing["tokens_dropped"]
    yield f"  truncated: {cut:,} rows, {dropped:,} tokens dropped"
    counts = ", ".join(f"{what} {count:,}" for what, count in manifest.selection.items())
    yield f"  raw rows: {counts}"
    yield from _histogram(manifest.length_histogram)


def _histogram(histogram: Mapping[str, Any]) -> Iterator[str]:
    """Yield a bar for each range of lengths, ranges without rows at both ends left out."""
    counts, width = np.array(histogram["counts"]), histogram["width"]
    filled = np.flatnonzero(counts)
    first, end = int(filled[0]), int(filled[-1]) + 1
    together = -(-(end - first) // _BINS)
    starts = range(first, end, together)
    sums = [int(counts[start : min(start + together, end)].sum()) for start in starts]
    for start, count in zip(starts, sums, strict=True):
        shown = f"{start * width}-{min(start + together, end) * width - 1}"
        bar = "#" * -(-_BAR * count // max(sums))
        yield f"  {shown:>11} {count:>9,} {bar}".rstrip()


def describe_step(recipe: Recipe, *, step: int, say: Say) -> Iterator[str]:
    """Yield lines about the rows of a training step, over all ranks.

    Raises:
        ValueError: If the run has no such step.
    """
    tokenizer, tasks = _prepared(recipe, say=say)
    plan = plan_steps(recipe, tasks)
    if step >= plan.total_steps:
        raise ValueError(
            f"--step: the run has the steps 0 to {plan.total_steps - 1}, got {step}: lower it, or "
            "raise train.max_duration"
        )
    loader = make_loader(recipe, tasks, tokenizer=tokenizer, mixture=plan.mixture)
    for used in loader.turns_of(step):
        dataset = next(t for t in tasks if t.task.name == used.task).datasets["train"]
        sources = np.asarray(dataset.take(used.rows, columns={"source_row"})["source_row"])
        yield f"step {step} of {plan.total_steps}: task {used.task}, {len(used.rows)} rows"
        for epoch in np.unique(used.epochs):
            chosen = used.epochs == epoch
            yield f"epoch {epoch}, rows: {' '.join(map(str, used.rows[chosen]))}"
            yield f"epoch {epoch}, rows of the source: {' '.join(map(str, sources[chosen]))}"


def show_rows(recipe: Recipe, *, task: str, number: int, say: Say) -> Iterator[str]:
    """Yield the first training rows of a task as the model reads them.

    Raises:
        ValueError: If there is no such task.
    """
    index = _index(recipe, task)
    tokenizer, tasks = _prepared(recipe, say=say)
    dataset = tasks[index].datasets["train"]
    rows = np.arange(min(number, len(dataset)))
    taken = dataset.take(rows, columns={"input_ids", "source_row"})
    for row, source, ids in zip(rows, taken["source_row"], taken["input_ids"], strict=True):
        yield f"row {row}, row {source} of the source, {len(ids)} tokens:"
        yield f"  {_quoted(tokenizer.decode(np.asarray(ids).tolist()))}"


def show_augmented(
    recipe: Recipe, *, task: str, number: int, epoch: int, say: Say
) -> Iterator[str]:
    """Yield the first raw training rows of a task before and after augmentation, as training does.

    Raises:
        ValueError: If there is no such task, or it is not augmented.
    """
    config = recipe.tasks[_index(recipe, task)]
    if not config.augmentation:
        raise ValueError(
            f"tasks.{task}.augmentation: the task is not augmented, got an empty list: list "
            "transforms, or leave --augmented out"
        )
    tokenizer, tasks = _prepared(recipe, say=say)
    prepared = tasks[_index(recipe, task)]
    dataset = prepared.datasets["train"]
    augmentation = make_augmentation(
        config, task=prepared.task, dataset=dataset, tokenizer=tokenizer
    )
    assert augmentation is not None
    reader = AugmentedReader(dataset, augmentation=augmentation, seed=recipe.seed, task=task)
    # Windows of one raw row are changed together: each raw row once.
    rows = np.unique(dataset.scalar("source_row"), return_index=True)[1][:number]
    for source, before, after, changes in reader.compare(np.sort(rows), epoch=epoch):
        yield f"row {source} of the source: {_describe_changes(changes)}"
        for column in augmentation.augmenter.fields.columns:
            if before.get(column) != after.get(column):
                yield f"  {column} before: {_quoted(before.get(column))}"
                yield f"  {column} after:  {_quoted(after.get(column))}"


def _describe_changes(changes: Changes) -> str:
    if changes.skipped:
        return f"left alone, {changes.skipped}"
    return ", ".join(f"{name} {count}" for name, count in changes.edits.items()) or "unchanged"


def _quoted(value: Any) -> str:
    """Return a value on one line, as JSON."""
    return json.dumps(value, ensure_ascii=False)


def _index(recipe: Recipe, task: str) -> int:
    names = [config.name for config in recipe.tasks]
    if task not in names:
        raise ValueError(f"--task: no task {task!r}: use one of {', '.join(names)}")
    return names.index(task)


def _prepared(recipe: Recipe, *, say: Say) -> tuple[PreTrainedTokenizerBase, list[PreparedTask]]:
    tokenizer = load_preprocessor(recipe)
    return tokenizer, prepare_tasks(recipe, tokenizer=tokenizer, say=say)
