"""Opens the data of a run that was trained already: to score it, or to go on with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_ft.config import Recipe, TaskConfig
from dist_ft.data.prepare import (
    PreparedDifferentlyError,
    PrepareSpec,
    prepare_split,
    split_folder,
    split_inputs,
)
from dist_ft.data.shards import ShardedDataset
from dist_ft.tasks.base import Task
from dist_ft.train.checkpoint_names import checkpoints_by_step
from dist_ft.train.data import PreparedTask, Say, prepare_tasks, split_plan, task_spec
from dist_ft.train.extensions import Extensions
from dist_ft.train.run_data import (
    is_same,
    manifest_of,
    other_data,
    other_lines,
    read_record,
    source_lines,
)
from dist_ft.train.run_folder import RunFolder


def prepare_resumed(
    recipe: Recipe, *, folder: RunFolder, tokenizer: Any, extensions: Extensions, say: Say
) -> list[PreparedTask]:
    """Return the tasks of a run that goes on; its own shards are never replaced by others.

    Raises:
        ValueError: If the source is not what those shards were made from, naming what differs.
    """
    kept = _own_shards(recipe, folder)
    try:
        return prepare_tasks(
            recipe, tokenizer=tokenizer, say=say, extensions=extensions, kept=list(kept)
        )
    except PreparedDifferentlyError as error:
        was, now = error.stored, error.wanted
        if error.folder not in kept or was["tokenizer"] != now["tokenizer"]:
            raise
        config = kept[error.folder]
        lines = [*source_lines(config, was["source"], now["source"]),
                 *other_lines(config, was, now)]  # fmt: skip
        raise ValueError(other_data(folder.root, lines)) from error


def _own_shards(recipe: Recipe, folder: RunFolder) -> dict[Path, TaskConfig]:
    """Return the folders that still hold what a run was trained on, and whose they are."""
    if not checkpoints_by_step(folder.checkpoints):
        return {}
    try:
        record = read_record(folder, recipe)
    except ValueError:  # an older version's run whose shards are gone: there is nothing to keep
        return {}
    return {
        shards: config
        for config in recipe.tasks
        for split, was in record.get(config.name, {"splits": {}})["splits"].items()
        if is_same(
            was, manifest_of(shards := split_folder(recipe.data_dir, task=config.name, split=split))
        )
    }


def restored_tasks(recipe: Recipe, *, folder: RunFolder, extensions: Extensions) -> list[Task]:
    """Return the tasks of a run with the labels that it was trained with; reads no data.

    Raises:
        ValueError: If the labels are nowhere to be found.
    """
    tasks = [extensions.make_task(config.arguments()) for config in recipe.tasks]
    if not any(task.needs_scan for task in tasks):
        return tasks
    record = read_record(folder, recipe)
    return [t.with_state(record[t.name]["state"]) if t.needs_scan else t for t in tasks]


def reopen_tasks(
    recipe: Recipe, *, folder: RunFolder, tokenizer: Any, extensions: Extensions, say: Say
) -> list[PreparedTask]:
    """Return the tasks of a run with the very data that it was trained and scored on.

    They are read from the prepared shards, without a look at the source. Only where those are gone,
    or were replaced, they are prepared again, from a source that must be what it was.

    Raises:
        ValueError: If neither shards nor source are what they were.
    """
    record = read_record(folder, recipe)
    tasks = restored_tasks(recipe, folder=folder, extensions=extensions)
    opened: list[PreparedTask] = []
    for config, task in zip(recipe.tasks, tasks, strict=True):
        known = record[config.name]
        datasets: dict[str, ShardedDataset] = {}
        for split, was in known["splits"].items():
            shards = split_folder(recipe.data_dir, task=config.name, split=split)
            if not is_same(was, manifest_of(shards)):
                own = extensions.implementation(config.name)
                spec = task_spec(config, task, tokenizer=tokenizer, own=own, split=split)
                kept = _Kept(folder.root, config, split, was, shards)
                _prepare_again(kept, spec, recipe=recipe, say=say)
            datasets[split] = ShardedDataset(shards, verify="cached")
        opened.append(PreparedTask(task, datasets, known["state"]))
    return opened


@dataclass(frozen=True)
class _Kept:
    """What a run's folder says of a split: whose it is, what it was, and where its shards lay."""

    run: Path
    config: TaskConfig
    split: str
    was: Mapping[str, Any]
    shards: Path


def _prepare_again(kept: _Kept, spec: PrepareSpec, *, recipe: Recipe, say: Say) -> None:
    config, split, was, shards = kept.config, kept.split, kept.was, kept.shards
    gone = "are not there" if manifest_of(shards) is None else "are of other data now"
    try:
        inputs = split_inputs(spec, split=split)
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(
            f"the shards of task {config.name}, {split}, in {shards} {gone}, and cannot be made "
            f"again: {error}"
        ) from error
    now = {key: inputs[key] for key in was["inputs"]}
    if now == was["inputs"]:
        say(f"{config.name}/{split}: the shards {gone}: prepared again")
        again = prepare_split(
            spec,
            split=split,
            data_dir=recipe.data_dir,
            replacing="settings",
            processes=recipe.data_processes,
        )
        if is_same(was, again.manifest):
            return
        raise ValueError(
            f"{kept.run}: task {config.name}, {split}: the same source gives other rows than in "
            f"training (dataset_id was {was['dataset_id']}, is {again.manifest.dataset_id}): use "
            "the versions of libraries in its env.json"
        )
    lines = [*source_lines(config, was["inputs"]["source"], now["source"]),
             *other_lines(config, was["inputs"], now)]  # fmt: skip
    lines.append(f"the shards in {shards} {gone}, too")
    raise ValueError(other_data(kept.run, lines))


def has_source(config: TaskConfig, dataset: ShardedDataset) -> bool:
    """Return whether a split's raw rows are still those that its shards were made from.

    Raises:
        ValueError: If the source can't be read.
    """
    plan = split_plan(config)
    manifest = dataset.manifest
    origin = manifest.split if manifest.split in plan.sources else "train"
    return plan.source_of(manifest.split).fingerprint == manifest.source[origin]
