"""Prepares the data of a recipe's tasks and opens what is prepared."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dist_ft.config import Recipe, SourceConfig, TaskConfig
from dist_ft.data.fingerprint import tokenizer_fingerprint
from dist_ft.data.manifest import fingerprint
from dist_ft.data.prepare import (
    PreparedSplit,
    PrepareSpec,
    Replacing,
    RowFunctions,
    SplitPlan,
    prepare_split,
    split_folder,
)
from dist_ft.data.selection import BATCH_ROWS
from dist_ft.data.shards import ShardedDataset
from dist_ft.data.sources import SourceSpec
from dist_ft.recipe.source_checks import named_columns
from dist_ft.tasks.base import Task
from dist_ft.tasks.single_label import LabelScan
from dist_ft.train.extensions import NO_EXTENSIONS, Extensions
from dist_ft.train.reading import ReadingProgress
from dist_ft.wording import counted

# Task settings that change how rows are scored or named, not what is in them.
NOT_IN_FEATURES = {"name", "data", "metric", "max_answer_length", "max_new_tokens", "on_error"}
NOT_IN_FEATURES |= {"augmentation", "segmentation"}

# Ten seconds of sound take 640 kB, and an image 150 kB, as a model takes them.
_MEDIA_AT_ONCE = 64

Say = Callable[[str], None]
# What is read, and about how many rows that is -> what shows how far it has come.
Reading = Callable[[str, Callable[[], int | None]], ReadingProgress]


@dataclass(frozen=True)
class PreparedTask:
    """A task that knows its labels, with the data of each split.

    Attributes:
        task: The task.
        datasets: By split.
        state: What ``task.scan`` found in the training rows; empty if it needs nothing of them.
    """

    task: Task
    datasets: dict[str, ShardedDataset]
    state: Mapping[str, Any] = field(default_factory=dict[str, Any])


def prepare_tasks(
    recipe: Recipe,
    *,
    tokenizer: PreTrainedTokenizerBase,
    say: Say,
    reading: Reading | None = None,
    extensions: Extensions = NO_EXTENSIONS,
    replacing: Replacing = "settings",
    kept: Collection[Path] = (),
) -> list[PreparedTask]:
    """Return every task with its splits, preparing what is not prepared yet.

    Any number of processes may call this at once: for each split one works and the others wait.

    Args:
        recipe: What to prepare.
        tokenizer: Of the model.
        say: Prints a line.
        reading: Shows how far reading has come; by default lines are printed now and then.
        extensions: Task implementations of the user's own.
        replacing: Which folders that were prepared differently are replaced; see `prepare_split`.
        kept: Folders of splits that are never replaced.

    Raises:
        ValueError: If a source, a column, a label or a row is bad, or if a folder was prepared
            with another tokenizer and may not be replaced.
    """
    extensions.check([task.name for task in recipe.tasks])

    def by_lines(name: str, expected: Callable[[], int | None]) -> ReadingProgress:
        return ReadingProgress(name, expected=expected, say=say)

    return [
        _prepare_task(
            config,
            recipe=recipe,
            tokenizer=tokenizer,
            say=say,
            reading=reading or by_lines,
            extensions=extensions,
            replacing=lambda folder: "nothing" if folder in kept else replacing,
        )
        for config in recipe.tasks
    ]


def _prepare_task(
    config: TaskConfig,
    *,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    say: Say,
    reading: Reading,
    extensions: Extensions,
    replacing: Callable[[Path], Replacing],
) -> PreparedTask:
    plan = split_plan(config)
    task = extensions.make_task(config.arguments())
    task.check_tokenizer(tokenizer)
    own = extensions.implementation(config.name)
    state: dict[str, Any] = {}
    if task.needs_scan:
        spec = task_spec(config, task, tokenizer=tokenizer, own=own)
        with reading(f"{config.name}, labels", plan.source_of("train").estimate) as progress:
            folder = recipe.data_dir / config.name
            state = _scanned(spec, task=task, folder=folder, progress=progress)
        task = task.with_state(state)
    datasets: dict[str, ShardedDataset] = {}
    for split in plan.splits:
        folder = split_folder(recipe.data_dir, task=config.name, split=split)
        with reading(f"{config.name}/{split}", plan.source_of(split).estimate) as progress:
            prepared = prepare_split(
                task_spec(config, task, tokenizer=tokenizer, own=own, split=split),
                split=split,
                data_dir=recipe.data_dir,
                replacing=replacing(folder),
                processes=recipe.data_processes,
                progress=progress,
            )
        say(_describe(config.name, split, prepared))
        datasets[split] = ShardedDataset(prepared.folder, verify="cached")
    return PreparedTask(task, datasets, state)


def _describe(task: str, split: str, prepared: PreparedSplit) -> str:
    manifest = prepared.manifest
    how = "ready" if prepared.reused else "prepared"
    if left_out := manifest.selection["invalid"]:
        how += f", {left_out:,} left out"
    return (
        f"{task}/{split}: {counted(manifest.rows, 'row')}, {counted(manifest.tokens, 'token')} "
        f"({how})"
    )


def task_spec(
    config: TaskConfig,
    task: Task,
    *,
    tokenizer: PreTrainedTokenizerBase,
    own: Mapping[str, str],
    split: str | None = None,
) -> PrepareSpec:
    """Return what the rows of a task's split depend on.

    Args:
        config: The task in the recipe.
        task: The task.
        tokenizer: The model's.
        own: What tells a program's own task from others; see ``Extensions.implementation``.
        split: Which one; None for what all have in common.
    """

    def encode(rows: list[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        return task.encode(rows, tokenizer=tokenizer)

    return PrepareSpec(
        task=config.name,
        plan=split_plan(config),
        functions=RowFunctions(
            schema=task.schema(),
            required_columns=task.required_columns,
            split_key=task.split_key,
            dedupe_key=task.dedupe_key,
            encode=encode,
            rows_at_once=BATCH_ROWS if config.takes == "text" else _MEDIA_AT_ONCE,
            named_columns=tuple(column for _, column in named_columns(config)),
            check=_check(task) if config.on_error == "skip" else None,
        ),
        tokenizer=tokenizer_fingerprint(tokenizer),
        arguments={
            **config.model_dump(mode="json", exclude=NOT_IN_FEATURES),
            "labels": None if task.needs_scan else task.config_updates().get("label2id"),
            **_encoding(task),
            **own,
        },
        on_error=config.on_error,
        # Only training rows are augmented, so only theirs are kept.
        raw_columns=raw_columns(config) if split == "train" else (),
    )


def _encoding(task: Task) -> dict[str, int]:
    """Return the version of what a task makes of its rows, if it is not the first one."""
    version = getattr(task, "encoding_version", 1)
    return {"encoding": version} if version > 1 else {}


def _check(task: Task) -> Callable[[dict[str, Any]], None] | None:
    """Return what refuses a row that `encode` would refuse, if that is known before.

    A scan looks for what a check would need, and a program's own `encode` may take other rows.
    """
    is_ours = task.encode.__module__.startswith("dist_ft.")
    return getattr(task, "check_row", None) if is_ours and not task.needs_scan else None


def raw_columns(config: TaskConfig) -> tuple[str, ...]:
    """Return the columns of the raw rows that augmented rows are made from; () without any."""
    columns: tuple[str | None, ...] = ()
    if not config.augmentation:
        return ()
    if config.type == "text_classification":
        columns = (config.text, config.text_pair, config.label)
    elif config.type == "token_classification":
        columns = (config.tokens, config.tags)
    elif config.type == "question_answering":
        columns = (config.question, config.context, config.answers, config.id)
    elif config.type == "generation":
        columns = (config.prompt, config.context, config.response)
    return tuple(c for c in columns if c is not None)


def selected_rows(
    config: TaskConfig, task: Task, *, tokenizer: PreTrainedTokenizerBase, split: str
) -> Iterator[dict[str, Any]]:
    """Yield a split's raw rows from their source, those that were encoded, in that order.

    Raises:
        ValueError: If the source can't be read.
    """
    return task_spec(config, task, tokenizer=tokenizer, own={}).raw_rows(split)


def split_plan(config: TaskConfig) -> SplitPlan:
    """Return where the splits of a task come from."""
    sources: dict[str, SourceSpec] = {"train": _source(config.data.train)}
    fractions: dict[str, float] = {}
    for name, value in (("validation", config.data.validation), ("test", config.data.test)):
        if isinstance(value, SourceConfig):
            sources[name] = _source(value)
        elif value is not None:
            fractions[name] = value
    # Paths in a loaded recipe are absolute already.
    return SplitPlan(sources=sources, base_dir=Path(), fractions=fractions)


def _source(config: SourceConfig) -> SourceSpec:
    return SourceSpec(**config.model_dump())


def _scanned(
    spec: PrepareSpec, *, task: Task, folder: Path, progress: ReadingProgress
) -> dict[str, Any]:
    """Return what `task` must know of its training rows, remembered from the last time."""
    key = fingerprint(
        {
            "sources": {s: spec.plan.source_of(s).fingerprint for s in spec.plan.splits},
            "fractions": dict(spec.plan.fractions),
            "arguments": dict(spec.arguments),
        }
    )
    path = folder / "scan.json"
    if path.is_file():
        known = json.loads(path.read_text())
        if known["key"] == key:
            return known["state"]
    rows = progress.each(spec.raw_rows("train"))
    if spec.on_error == "skip" and isinstance(task, LabelScan):
        rows = filter(task.has_labels, rows)  # counted and told when the rows are prepared
    state = task.scan(rows)
    folder.mkdir(parents=True, exist_ok=True)
    # Every rank may be here at once, of several hosts, and forked ones share even the addresses
    # of their objects.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_text(json.dumps({"key": key, "state": state}, indent=1))
    temporary.replace(path)
    return state


def steps_per_epoch(tasks: Sequence[PreparedTask], *, global_batch_size: int) -> float:
    """Return the optimizer steps in which every task's rows are used once on average."""
    rows = sum(len(t.datasets["train"]) for t in tasks)
    return rows / global_batch_size


def tokens_per_step(
    tasks: Sequence[PreparedTask],
    *,
    global_batch_size: int,
    shares: Sequence[float] | None = None,
) -> float:
    """Return the mean useful tokens of a step; without `shares`, the tasks take turns."""
    means = [float(t.datasets["train"].lengths.mean()) for t in tasks]
    if shares is None:
        return global_batch_size * sum(means) / len(means)
    return global_batch_size * sum(m * s for m, s in zip(means, shares, strict=True))
