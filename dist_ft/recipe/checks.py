"""What a schema can't say: files that must exist, sections that must agree with each other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from dist_ft.config import (
    BanditMixtureConfig,
    ExplicitFreezing,
    FixedMixture,
    GradualFreezing,
    PlateauFreezing,
    Recipe,
)
from dist_ft.duration import Duration
from dist_ft.recipe.augmentation_checks import check_augmentation
from dist_ft.recipe.deepspeed_json import check_deepspeed
from dist_ft.recipe.errors import Finding, closest, show_value
from dist_ft.recipe.evaluation_checks import check_evaluation, check_lora
from dist_ft.recipe.model_folder import check_model, count_blocks
from dist_ft.recipe.reading import RawPath
from dist_ft.recipe.regularization_checks import check_regularization
from dist_ft.recipe.source_checks import check_sources
from dist_ft.recipe.task_checks import check_inputs, check_tasks, metrics_of
from dist_ft.recipe.validate import Draft

_BLOCK = re.compile(r"block\.(\d{1,6})")
# Numbers of blocks that a policy may name, and what they do.
_BLOCK_KEYS = ("depth", "max_depth", "first", "blocks")


def check(draft: Draft, *, needs_files: bool = True) -> list[Finding]:
    """Return what is wrong between the sections of a recipe and with the files that it names.

    Args:
        draft: The recipe so far.
        needs_files: Whether the model's weights and the data must be there.
    """
    recipe = draft.recipe
    assert recipe is not None
    files = [*check_model(draft, recipe.model), *check_sources(draft, recipe)]
    return [
        *(files if needs_files else ()),
        *check_tasks(draft, recipe),
        *check_inputs(draft, recipe),
        *check_augmentation(draft, recipe),
        *_check_weights(draft, recipe),
        *_check_depth(draft, recipe),
        *_check_block_names(draft, recipe),
        *_check_phases(draft, recipe),
        *_check_turns(draft, recipe),
        *_check_plateau(draft, recipe),
        *_check_durations(draft, recipe),
        *check_regularization(draft, recipe),
        *check_evaluation(draft, recipe),
        *check_lora(draft, recipe),
        *check_deepspeed(draft, recipe),
    ]


def _check_depth(draft: Draft, recipe: Recipe) -> Iterator[Finding]:
    blocks = count_blocks(recipe.model.path) if draft.is_sure("model", "path") else None
    if blocks is None:
        return
    for key in _BLOCK_KEYS:
        value = getattr(recipe.freezing, key, None)
        if value is not None and value > blocks and draft.is_sure("freezing", key):
            rule = f"must be at most {blocks}, the number of the model's blocks"
            yield Finding(("freezing", key), f"{rule}, got {value}: lower it")


def _check_block_names(draft: Draft, recipe: Recipe) -> Iterator[Finding]:
    """Yield the names of blocks that the model does not have; patterns are for the run to see."""
    blocks = count_blocks(recipe.model.path) if draft.is_sure("model", "path") else None
    if blocks is None or recipe.freezing.layer_groups:
        return
    for path, name in _group_names(recipe):
        named = _BLOCK.fullmatch(name)
        if named and int(named[1]) >= blocks and draft.is_sure(*path):
            rule = f"must be a block of the model, block.0 to block.{blocks - 1}"
            yield Finding(path, f"{rule}, got {show_value(name)}: correct it")


def _group_names(recipe: Recipe) -> Iterator[tuple[RawPath, str]]:
    freezing = recipe.freezing
    places: list[tuple[RawPath, list[str] | None]] = [
        (("freezing", key), getattr(freezing, key, None))
        for key in ("frozen", "trainable", "always")
    ]
    if isinstance(freezing, ExplicitFreezing):
        places += [
            (("freezing", "phases", i, "trainable"), p.trainable)
            for i, p in enumerate(freezing.phases)
        ]
    for path, names in places:
        yield from (((*path, i), name) for i, name in enumerate(names or ()))


def _check_phases(draft: Draft, recipe: Recipe) -> Iterator[Finding]:
    whole, phases = recipe.train.max_duration, getattr(recipe.freezing, "phases", None)
    if not isinstance(phases, int) or whole.unit != "step" or not 0 < whole.value < phases:
        return
    if draft.is_sure("freezing", "phases") and draft.is_sure("train", "max_duration"):
        text = (
            f"{phases} phases do not fit into {whole.value:,.0f} steps: lower it, or train longer"
        )
        yield Finding(("freezing", "phases"), text)


def _check_weights(draft: Draft, recipe: Recipe) -> Iterator[Finding]:
    path: RawPath = ("mixture", "weights")
    if not isinstance(recipe.mixture, FixedMixture) or not draft.is_sure(*path):
        return
    names = [task.name for task in recipe.tasks]
    if not all(draft.is_sure("tasks", index, "name") for index in range(len(names))):
        return
    for name in recipe.mixture.weights:
        if name not in names:
            meant = closest(name, names)
            remedy = f"did you mean {meant}?" if meant else f"use one of {', '.join(names)}"
            yield Finding((*path, name), f"must be the name of a task: {remedy}")
    known = recipe.mixture.weights
    if missing := [n for n in names if n not in known and draft.is_sure(*path, n)]:
        yield Finding(path, f"must name every task, got none for {', '.join(missing)}: add them")


def _check_turns(draft: Draft, recipe: Recipe) -> Iterator[Finding]:
    mixture = recipe.mixture
    if not isinstance(mixture, BanditMixtureConfig):
        return
    if mixture.reward == "gain" and recipe.evaluation.every is None:
        text = "is what validation gains, but evaluation.every is not given: give it"
        yield Finding(("mixture", "reward"), text)
    if mixture.tasks_per_step > 1:
        text = (
            "decides one turn at a time, which steps of several turns do not wait for: set "
            "mixture.tasks_per_step=1 or choose another policy"
        )
        if draft.is_sure("mixture"):
            yield Finding(("mixture", "tasks_per_step"), text)


def _check_plateau(draft: Draft, recipe: Recipe) -> Iterator[Finding]:
    freezing = recipe.freezing
    if not isinstance(freezing, PlateauFreezing):
        return
    watched = [t for t in recipe.tasks if freezing.task in (None, t.name)]
    for task in watched if freezing.metric and draft.is_sure("freezing", "metric") else ():
        known = (*metrics_of(task), "loss")
        if freezing.metric not in known:
            rule = f"must be a metric of task {task.name} ({', '.join(known)})"
            text = f"{rule}, got {show_value(freezing.metric)}: use one, or name a task"
            yield Finding(("freezing", "metric"), text)
            break
    if freezing.task is None:
        return
    names = [task.name for task in recipe.tasks]
    if freezing.task in names or not draft.is_sure("freezing", "task"):
        return
    meant = closest(freezing.task, names)
    remedy = f"did you mean {meant}?" if meant else f"use one of {', '.join(names)}"
    text = f"must be the name of a task, got {show_value(freezing.task)}: {remedy}"
    yield Finding(("freezing", "task"), text)


def _check_durations(draft: Draft, recipe: Recipe) -> Iterator[Finding]:
    whole = recipe.train.max_duration
    for path, duration in _intervals(recipe):
        if duration.value <= 0 and draft.is_sure(*path):
            yield Finding(path, f"must be longer than nothing, got '{duration}': raise it")
    for path, duration in _moments(recipe):
        sure = draft.is_sure(*path) and draft.is_sure("train", "max_duration")
        if sure and duration.unit == whole.unit and duration.value >= whole.value > 0:
            rule = f"must come before train.max_duration ({whole})"
            yield Finding(path, f"{rule}, got '{duration}': lower it or train longer")
    phases = _phase_starts(recipe)
    for (_, earlier), (path, later) in pairwise(phases):
        ordered = earlier.unit != later.unit or earlier.value < later.value
        if not ordered and draft.is_sure("freezing"):
            text = f"must be later than the phase before ({earlier}), got '{later}': sort them"
            yield Finding(path, text)


def _intervals(recipe: Recipe) -> Iterator[tuple[RawPath, Duration]]:
    places: list[tuple[RawPath, Any]] = [
        (("train", "max_duration"), recipe.train.max_duration),
        (("evaluation", "every"), recipe.evaluation.every),
        *(
            (("checkpoint", k), getattr(recipe.checkpoint, k))
            for k in ("every", "keep_every", "ephemeral_every")
        ),
        (("freezing", "every"), getattr(recipe.freezing, "every", None)),
        (
            ("regularization", "averaging", "every"),
            getattr(recipe.regularization.averaging, "every", None),
        ),
    ]
    yield from ((path, duration) for path, duration in places if duration is not None)


def _moments(recipe: Recipe) -> Iterator[tuple[RawPath, Duration]]:
    yield ("optim", "schedule", "warmup"), recipe.optim.schedule.warmup
    if recipe.regularization.averaging is not None:
        yield ("regularization", "averaging", "start"), recipe.regularization.averaging.start
    yield from _phase_starts(recipe)


def _phase_starts(recipe: Recipe) -> list[tuple[RawPath, Duration]]:
    freezing = recipe.freezing
    if isinstance(freezing, GradualFreezing):
        return [(("freezing", "at", i), at) for i, at in enumerate(freezing.at or [])]
    if isinstance(freezing, ExplicitFreezing):
        return [(("freezing", "phases", i, "at"), p.at) for i, p in enumerate(freezing.phases)]
    return []
