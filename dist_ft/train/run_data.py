"""What a run was trained on: kept in its folder, and compared when it goes on.

A finished run must not depend on its raw data: they are edited, moved and removed. What its head's
outputs mean (the labels) and what tells its data from others lie in ``data.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_ft.config import Recipe, SourceConfig, TaskConfig
from dist_ft.data.manifest import Manifest, differences, read_manifest
from dist_ft.data.prepare import split_folder
from dist_ft.train.checkpoint import TRAINER
from dist_ft.train.checkpoint_names import checkpoints_by_step
from dist_ft.train.data import PreparedTask, split_plan
from dist_ft.train.run_folder import RunFolder

FILE = "data.json"
FORMAT_VERSION = 1
_SHOWN_DIGITS = 8
_REMEDY = (
    "put back what it was trained on, or train a new run, under another name, on what is there now"
)

# By task: {"state": what the task knows of its training rows, "splits": by split {"dataset_id",
# "inputs": what the rows depend on}}.
Record = Mapping[str, Mapping[str, Any]]


def keep_data(folder: RunFolder, recipe: Recipe, tasks: Sequence[PreparedTask]) -> None:
    """Write what a run trains on into its folder; if it has trained already, check it first.

    Raises:
        ValueError: If a checkpoint was trained on other data, naming the files and labels.
    """
    now = {t.task.name: _described(t) for t in tasks}
    if checkpoints_by_step(folder.checkpoints):
        if (folder.root / FILE).is_file():
            _refuse_other(folder, recipe, was=_read(folder), now=now)
        else:
            _refuse_other_ids(folder, now=now)
    folder.write_json(FILE, {"format_version": FORMAT_VERSION, "tasks": now})


def other_data(run: Path, lines: Iterable[str]) -> str:
    """Return the error of a run whose data differ in what `lines` say."""
    different = "; ".join(dict.fromkeys(lines))
    return f"{run} was trained on other data; what differs: {different}: {_REMEDY}"


def _described(prepared: PreparedTask) -> dict[str, Any]:
    return {
        "state": dict(prepared.state),
        "splits": {
            split: {
                "dataset_id": data.manifest.dataset_id,
                "rows": len(data),
                "inputs": _inputs(data.manifest),
            }
            for split, data in prepared.datasets.items()
        },
    }


def _inputs(manifest: Manifest) -> dict[str, Any]:
    """Return what the rows depend on, as far as it can differ between runs of one recipe."""
    return {
        "tokenizer": dict(manifest.tokenizer),
        "preprocessing": {k: manifest.preprocessing[k] for k in ("version", "arguments")},
        "source": dict(manifest.source),
    }


def manifest_of(shards: Path) -> Manifest | None:
    """Return the manifest of a folder of shards, None if there is no whole one."""
    try:
        return read_manifest(shards)
    except ValueError:
        return None


def is_same(was: Mapping[str, Any], manifest: Manifest | None) -> bool:
    """Return whether shards are those of a split that a run's record describes."""
    if manifest is None:
        return False
    if was["dataset_id"] is None:  # runs of older versions kept only that of their training rows
        return was["inputs"] == _inputs(manifest)
    return was["dataset_id"] == manifest.dataset_id


def _refuse_other(
    folder: RunFolder, recipe: Recipe, *, was: Record, now: Mapping[str, Mapping[str, Any]]
) -> None:
    lines: list[str] = []
    for config in recipe.tasks:
        before, after = was[config.name], now[config.name]
        changed = [
            split
            for split in before["splits"] | after["splits"]
            if _id(before, split) != _id(after, split)
        ]
        of_task: list[str] = []
        for split in changed:
            old, new = (body["splits"].get(split, {}).get("inputs", {}) for body in (before, after))
            of_task += source_lines(config, old.get("source", {}), new.get("source", {}))
            of_task += other_lines(config, old, new)
        if changed and not of_task:
            of_task = [f"tasks.{config.name}.data: {', '.join(changed)}: dataset_id "
                       f"{_id(before, changed[0])} -> {_id(after, changed[0])}"]  # fmt: skip
        lines += of_task
    if lines:
        raise ValueError(other_data(folder.root, lines))


def _id(body: Mapping[str, Any], split: str) -> str | None:
    return body["splits"].get(split, {}).get("dataset_id")


def source_lines(
    config: TaskConfig, was: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[str]:
    """Yield which files of a task's sources differ, and how."""
    for origin in sorted(was.keys() | now.keys()):
        old, new = was.get(origin, {}), now.get(origin, {})
        if old == new:
            continue
        source = getattr(config.data, origin, None)
        place = f"tasks.{config.name}.data"
        if not isinstance(source, SourceConfig) or not {"files"} <= old.keys() & new.keys():
            yield f"{place} ({'; '.join(differences(old, new, path=origin))})"
            continue
        before, after = ({f["name"]: f for f in side["files"]} for side in (old, new))
        changed = [
            f"{name} was {_shown(before.get(name))}, is {_shown(after.get(name))}"
            for name in sorted(before.keys() | after.keys())
            if before.get(name) != after.get(name)
        ]
        yield f"{place}.{origin} = {source.path} ({'; '.join(changed) or 'in another order'})"


def _shown(file: Mapping[str, Any] | None) -> str:
    if file is None:
        return "not there"
    return f"{file['bytes']:,} bytes with sha256 {file['sha256'][:_SHOWN_DIGITS]}..."


def other_lines(
    config: TaskConfig, was: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[str]:
    """Yield what else than a source differs: the labels first, by their names."""
    sides = [dict(side.get("preprocessing", {}).get("arguments", {})) for side in (was, now)]
    old, new = (side.pop("labels", None) for side in sides)
    if old != new:
        before, after = (_in_order(labels or {}) for labels in (old, new))
        yield f"tasks.{config.name}.labels (were {before}; are {after})"
    yield from differences(sides[0], sides[1], path=f"tasks.{config.name}")
    yield from differences(was.get("tokenizer", {}), now.get("tokenizer", {}), path="tokenizer")


def _in_order(labels: Mapping[str, int]) -> str:
    return ", ".join(sorted(labels, key=labels.__getitem__)) or "none"


def _read(folder: RunFolder) -> Record:
    body = json.loads((folder.root / FILE).read_text())
    if body["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{folder.root / FILE} has format version {body['format_version']}, this version reads "
            f"{FORMAT_VERSION}: use the version of dist_ft that trained the run"
        )
    return body["tasks"]


def read_record(folder: RunFolder, recipe: Recipe) -> Record:
    """Return what the run was trained on; of an older version's run, what its shards say.

    Raises:
        ValueError: If nothing says it.
    """
    if (folder.root / FILE).is_file():
        return _read(folder)
    ids = _trained_ids(folder)
    return {config.name: _of_shards(config, recipe, folder, ids) for config in recipe.tasks}


def _trained_ids(folder: RunFolder) -> dict[str, str]:
    """Return the id of each task's training rows, as the newest readable checkpoint has it."""
    for _, path in reversed(checkpoints_by_step(folder.checkpoints)):
        try:
            data = json.loads((path / TRAINER).read_text())["data"]
            return {task: body["dataset_id"] for task, body in data["datasets"].items()}
        except (OSError, ValueError, KeyError):
            continue
    return {}


def _refuse_other_ids(folder: RunFolder, *, now: Mapping[str, Mapping[str, Any]]) -> None:
    """Check the training rows of a run that an older version has begun."""
    was = _trained_ids(folder)
    changed = [name for name, body in now.items() if was.get(name) != _id(body, "train")]
    if was and changed:
        raise ValueError(
            f"{folder.root} was trained on other data of task {', '.join(changed)} (dataset_id of "
            f"its rows was {was.get(changed[0])}, is {_id(now[changed[0]], 'train')}): {_REMEDY}"
        )


def _of_shards(
    config: TaskConfig, recipe: Recipe, folder: RunFolder, ids: Mapping[str, str]
) -> dict[str, Any]:
    shards = split_folder(recipe.data_dir, task=config.name, split="train")
    found, was = manifest_of(shards), ids.get(config.name)
    if found is None or was is None or found.dataset_id != was:
        now = "there are none" if found is None else f"is {found.dataset_id}"
        raise ValueError(
            f"{folder.root} does not say which labels task {config.name} has (an older version "
            f"trained it), and the shards in {shards} are not those that it was trained on "
            f"(dataset_id was {was}, {now}): put its data back as they were and run `dist-ft "
            "prepare` with its recipe"
        )
    inputs = _inputs(found)
    labels = inputs["preprocessing"]["arguments"].get("labels")
    return {
        "state": {"labels": sorted(labels, key=labels.__getitem__)} if labels else {},
        "splits": {
            "train": {"dataset_id": was, "inputs": inputs},
            **{
                split: {"dataset_id": None, "inputs": _inputs_of_split(config, inputs, split)}
                for split in split_plan(config).splits
                if split != "train"
            },
        },
    }


def _inputs_of_split(config: TaskConfig, of_train: Mapping[str, Any], split: str) -> dict[str, Any]:
    """Return what another split's rows depended on, which what training rows depend on tells."""
    arguments = dict(of_train["preprocessing"]["arguments"])
    arguments.pop("raw_columns", None)
    source = of_train["source"]
    if split in split_plan(config).sources:
        source = {"fractions": {}, split: source[split]}
    return {
        "tokenizer": of_train["tokenizer"],
        "preprocessing": {**of_train["preprocessing"], "arguments": arguments},
        "source": source,
    }
