"""The command ``dist-ft import``: from another trainer's file to a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dist_ft.importing.draft import Draft
from dist_ft.importing.schedules import from_finetuning_scheduler
from dist_ft.importing.trainers import from_axolotl, from_llama_factory, from_trainer
from dist_ft.recipe.validate import validate

KINDS: dict[str, Callable[[Draft], None]] = {
    "hf-trainer-args": from_trainer,
    "axolotl": from_axolotl,
    "llama-factory": from_llama_factory,
    "finetuning-scheduler": from_finetuning_scheduler,
}
_ORDER = ("name", "seed", "model", "tasks", "freezing", "optim", "engine", "train", "evaluation")


@dataclass(frozen=True)
class Imported:
    """A translated file.

    Attributes:
        text: The recipe as YAML; what was not translated stands above it as comments.
        notes: The same comments, a sentence each.
    """

    text: str
    notes: tuple[str, ...]


def import_recipe(file: Path, *, kind: str, ranks: int = 1) -> Imported:
    """Return the recipe of another trainer's file.

    Args:
        file: YAML or JSON.
        kind: Which trainer, a key of ``KINDS``.
        ranks: On how many ranks it ran.

    Raises:
        ValueError: If the kind is unknown or the file is not one of its kind.
    """
    if kind not in KINDS:
        raise ValueError(
            f"--from: must be one of {', '.join(KINDS)}, got {kind!r}: use one of them"
        )
    if ranks < 1:
        raise ValueError(f"--ranks: must be at least 1, got {ranks}: raise it")
    draft = Draft(source=_read(file), folder=file.parent, ranks=ranks)
    KINDS[kind](draft)
    draft.finish()
    body = {key: draft.recipe[key] for key in _ORDER if key in draft.recipe}
    body |= {key: value for key, value in draft.recipe.items() if key not in body}
    if kind != "finetuning-scheduler":
        for finding in validate(body).findings:
            place = ".".join(str(part) for part in finding.path)
            draft.note(f"to be mended: {place}: {finding.text}")
    lines = [f"# Translated from {file.name} ({kind}) by dist-ft import."]
    lines += [f"# - {note}".replace("\n", " ") for note in draft.notes]
    text = yaml.safe_dump(body, sort_keys=False, width=100)
    return Imported("\n".join(lines) + "\n" + text, tuple(draft.notes))


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        body = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"{file} can't be read ({error.strerror}): correct the path") from None
    except (ValueError, yaml.YAMLError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"{file} is neither YAML nor JSON ({first}): mend it there") from None
    if not isinstance(body, dict) or not body:
        raise ValueError(f"{file} must hold `key: value` lines, got {type(body).__name__}")
    return body
