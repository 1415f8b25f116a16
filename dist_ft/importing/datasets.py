"""Data of instruction tuning as the tasks of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dist_ft.importing.draft import Draft
from dist_ft.importing.values import as_list, as_mapping, as_names, as_text
from dist_ft.recipe.errors import TO_FILL

# Columns of the prompt formats that have plain ones.
_FORMATS = {
    "alpaca": {"prompt": "instruction", "context": "input", "response": "output"},
    "oasst": {"prompt": "INSTRUCTION", "response": "RESPONSE"},
}
_UNKNOWN = {"prompt": TO_FILL, "response": TO_FILL}
_LOADERS = ("json", "csv", "parquet", "arrow")
_WITHHELD = "10 % of the training rows are withheld here: give tasks.*.data.validation"


def put_tasks(
    draft: Draft, entries: Sequence[Mapping[str, Any]], *, length: int, split: str
) -> None:
    """Translate the data sets, each to a task, with the share that is withheld from them.

    Args:
        draft: The recipe so far.
        entries: Of the data sets.
        length: Tokens of a row.
        split: The source's key for the share.
    """
    validation = draft.number(split)
    share = validation if validation is not None and 0 < validation < 1 else None
    if share is None:
        given = "no rows for validation" if not validation else f"{validation:g} rows"
        draft.note(f"not translated: {split}, {given}; {_WITHHELD}")
    target = max(1, length // 2)
    draft.note(
        f"max_target_length: {target} of {length} tokens is a guess, and longer responses are cut: "
        "raise it if there are any"
    )
    tasks = [_task(draft, entry, number=number) for number, entry in enumerate(entries)]
    for task in tasks:
        task["max_length"], task["max_target_length"] = length, target
        if share is not None:
            task["data"]["validation"] = share
    draft.put("tasks", tasks)
    if len(tasks) > 1:
        # Other trainers join their rows, so that every row comes as often as any other.
        draft.put("mixture.policy", "examples_proportional")
        draft.note(
            f"{len(tasks)} data sets are as many tasks here, each scored by itself, with a head of "
            "its own unless the model's is tied: join their files for one"
        )


def axolotl_entries(draft: Draft) -> list[Mapping[str, Any]]:
    """Return Axolotl's data sets; a text alone is the path of one."""
    found: list[Mapping[str, Any]] = []
    for number, entry in enumerate(draft.take_as(as_list, "datasets") or [{}]):
        given = {"path": entry} if isinstance(entry, str) else entry
        found.append(as_mapping(given, f"datasets[{number}]"))
    return found


def source_of(path: str | None, *, subset: str | None = None, split: str | None = None) -> Any:
    """Return the source of a split: its path alone if there is no more to say."""
    given = {"path": path or TO_FILL, "subset": subset, "split": split}
    found = {key: value for key, value in given.items() if value is not None}
    return found if len(found) > 1 else found["path"]


def note_withheld(draft: Draft) -> None:
    """Note that rows are taken out of the training rows, as none are named for validation."""
    draft.note(f"validation: the file names no file; {_WITHHELD}")


def _task(draft: Draft, entry: Mapping[str, Any], *, number: int) -> dict[str, Any]:
    columns = _columns(draft, entry.get("type"), place=f"datasets[{number}].type")
    return {
        "name": "chat" if number == 0 else f"chat{number + 1}",
        "type": "generation",
        **columns,
        "separator": "\n\n",
        "data": {"train": _source(draft, entry, place=f"datasets[{number}]")},
    }


def _columns(draft: Draft, given: Any, *, place: str) -> Mapping[str, str]:
    kind = "" if given is None else "own" if isinstance(given, dict) else as_text(given, place)
    kind = kind.partition(":")[0]
    if kind in _FORMATS:
        if "datasets" in draft.source:
            draft.note(f"{place} {kind!r}: the words that it puts around prompts are left out")
        return _FORMATS[kind]
    if kind == "completion":
        draft.note(
            f"{place} {kind!r}: there is no training on plain text: give the columns of a prompt "
            "and its response"
        )
    else:
        draft.note(
            f"{place} {given!r}: is not known: fill in the columns `prompt` and `response`, or "
            "give `messages` in their place"
        )
    return _UNKNOWN


def _source(draft: Draft, entry: Mapping[str, Any], *, place: str) -> Any:
    texts = {
        key: None if entry.get(key) is None else as_text(entry[key], f"{place}.{key}")
        for key in ("path", "name", "split")
    }
    used = {*texts, "type"}
    files = entry.get("data_files")
    if files is not None and texts["path"] in _LOADERS:
        names = as_names(files, f"{place}.data_files")
        # The path is only what reads the file.
        texts["path"] = names[0] if len(names) == 1 else None
        used |= {"data_files"} if len(names) == 1 else set()
    for key, value in entry.items():
        if key not in used and value not in (None, False, "", [], {}):
            draft.note(f"not translated: {place}.{key} = {value!r}")
    return source_of(texts["path"], subset=texts["name"], split=texts["split"])
