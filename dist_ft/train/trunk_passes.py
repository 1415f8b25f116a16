"""Decides how a recipe's model runs its blocks: without padding, and from a cached prefix on."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch

from dist_ft.config import Recipe
from dist_ft.data.bandit import BanditMixture
from dist_ft.engine.base import DTYPES
from dist_ft.engine.trunk_pass import TrunkPasses
from dist_ft.freezing.activation_cache import ActivationCache
from dist_ft.freezing.policies import ScheduledPolicy
from dist_ft.freezing.schedule import frozen_prefix
from dist_ft.model.trunk import Trunk
from dist_ft.train.parts import Parts
from dist_ft.train.regularization import changes_hidden_states
from dist_ft.train.run_folder import RunFolder

# How often a row must come, on average, while some prefix is frozen, to be worth keeping.
_LEAST_VISITS = 1.25
# Settings by which transformers' models limit how far a token sees.
_WINDOWS = ("sliding_window", "local_attention", "attention_window", "attention_chunk_size")
_ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")


def make_passes(
    recipe: Recipe,
    parts: Parts,
    *,
    folder: RunFolder,
    device: torch.device,
    say: Callable[[str], None],
) -> TrunkPasses:
    """Return how micro-batches go through the model's blocks; the model is not wrapped yet.

    Raises:
        ValueError: If the recipe insists on what the model can't do.
    """
    wants_cache = _wants_cache(recipe, parts)
    if wants_cache and (reason := changes_hidden_states(recipe)):
        say(f"the frozen prefix is not cached: {reason}")
        wants_cache = False
    if recipe.model.padding == "padded" and not wants_cache:
        return TrunkPasses()
    if any(t.type == "image_classification" for t in recipe.tasks):
        reason = "its inputs are no tokens"
        _refuse(recipe, unpadded=reason, boundary=reason if wants_cache else None, say=say)
        return TrunkPasses()
    try:
        trunk = Trunk.find(parts.model, groups=parts.groups)
        problems = trunk.check()
    except ValueError as error:
        _refuse(recipe, unpadded=str(error), boundary=str(error), say=say)
        return TrunkPasses()
    unpadded = problems.get("unpadded") or _unsuited(recipe, parts, device=device)
    _refuse(
        recipe,
        unpadded=unpadded,
        boundary=problems.get("boundary") if wants_cache else None,
        say=say,
    )
    trunk.flat = recipe.model.padding != "padded" and unpadded is None
    passes = TrunkPasses(
        trunk=trunk,
        order=tuple(g.name for g in parts.groups if g.kind != "head"),
        parameters={g.name: g.parameters for g in parts.groups},
    )
    tasks = tasks_that_return(recipe, parts) if wants_cache else frozenset()
    if tasks and "boundary" not in problems:
        if isinstance(parts.policy, ScheduledPolicy):
            passes.schedule = tuple(frozenset(p.trainable) for p in parts.policy.phases)
        passes.cache = _cache(recipe, parts, tasks=tasks, folder=folder, width=trunk.width)
    return passes


def _wants_cache(recipe: Recipe, parts: Parts) -> bool:
    """Return whether some phase has blocks of a frozen prefix, and the recipe lets them be kept."""
    if recipe.cache.policy == "off" or not any(not t.augmentation for t in recipe.tasks):
        return False
    if recipe.freezing.prefix_dropout:
        if recipe.cache.policy == "on":
            raise ValueError(
                "freezing.prefix_dropout: true draws other activations each time, so cache.policy: "
                "on has nothing to keep: set one of them otherwise"
            )
        return False
    if not isinstance(parts.policy, ScheduledPolicy):
        # A few blocks at a time in turn keep the embeddings training, as a rule.
        return "embeddings" not in parts.policy.phase_at(0).trainable
    return bool(_steps_with_prefix(parts))


def _unsuited(recipe: Recipe, parts: Parts, *, device: torch.device) -> str | None:
    """Return why running without padding would be wrong, slow or unwanted here."""
    if recipe.kernels == "reference" and recipe.model.padding == "auto":
        return "kernels: reference leaves the model as transformers made it"
    config: Any = parts.model.backbone.config
    longest = max(t.max_length for t in recipe.tasks)
    windows = [w for name in _WINDOWS if isinstance(w := getattr(config, name, None), int)]
    if windows and min(windows) < longest:
        return f"its tokens see {min(windows)} others and rows may have {longest} tokens"
    chosen = recipe.regularization.dropout.attention
    dropout = [getattr(config, name, 0.0) or 0.0 for name in _ATTENTION_DROPOUTS]
    dropout = dropout if chosen is None else [chosen]
    if device.type == "cuda" and recipe.model.padding == "auto" and max(dropout) > 0:
        return "torch's attention for rows without padding has no dropout on GPUs"
    return None


def _refuse(
    recipe: Recipe, *, unpadded: str | None, boundary: str | None, say: Callable[[str], None]
) -> None:
    """Say what the model can't do, or raise if the recipe asks for just that."""
    # Rows of any length share the micro-batches of a packed layout: they would be mostly padding.
    packed = recipe.train.layout == "packed"
    insists = packed or recipe.model.padding == "unpadded"
    key = "train.layout: packed" if packed else "model.padding"
    for reason, where, wanted, without in (
        (unpadded, key, insists, "blocks run with padding"),
        (boundary, "cache.policy", recipe.cache.policy == "on", "the frozen prefix is not cached"),
    ):
        if reason is None:
            continue
        if wanted:
            raise ValueError(
                f"{where}: {recipe.model.path} can't do it, as {reason}: choose another value"
            )
        say(f"{without}: {reason}")


def tasks_that_return(recipe: Recipe, parts: Parts) -> frozenset[str]:
    """Return the tasks whose rows can be cached and, unless the recipe insists, pay for it.

    A row that comes once while a prefix is frozen costs a write and is never read.
    """
    names = [c.name for c in recipe.tasks if not c.augmentation]
    if recipe.cache.policy == "on":
        return frozenset(names)
    steps = _steps_with_prefix(parts)
    size = recipe.train.global_batch_size
    found: set[str] = set()
    for index, t in enumerate(parts.tasks):
        if isinstance(parts.mixture, BanditMixture):  # which decides as it goes
            own = sum(end - start for start, end in steps) / len(parts.tasks)
        else:
            before = parts.mixture.steps_before
            own = sum(
                before(end * parts.turns)[index] - before(start * parts.turns)[index]
                for start, end in steps
            )
        if t.task.name in names and own * size >= _LEAST_VISITS * len(t.datasets["train"]):
            found.add(t.task.name)
    return frozenset(found)


def _steps_with_prefix(parts: Parts) -> list[tuple[int, int]]:
    """Return the first step and the end of each phase with frozen blocks, as far as known."""
    if not isinstance(parts.policy, ScheduledPolicy):
        return [(0, parts.total_steps)]
    order = [g.name for g in parts.groups if g.kind != "head"]
    blocks = {g.name for g in parts.groups if g.kind == "block"}
    phases = parts.policy.phases
    ends = [*(p.start_step for p in phases[1:]), parts.total_steps]
    return [
        (p.start_step, end)
        for p, end in zip(phases, ends, strict=True)
        if end > p.start_step and blocks.intersection(frozen_prefix(order, frozenset(p.trainable)))
    ]


def _cache(
    recipe: Recipe, parts: Parts, *, tasks: frozenset[str], folder: RunFolder, width: int
) -> ActivationCache:
    # Of one host: processes of several may not map one file of a network file system.
    root = folder.root / "cache" if recipe.cache.dir is None else recipe.cache.dir / recipe.name
    return ActivationCache(
        root / (platform.node() or "host"),
        lengths={
            t.task.name: t.datasets["train"].lengths for t in parts.tasks if t.task.name in tasks
        },
        width=width,
        dtype=DTYPES[recipe.engine.precision],
        budget_bytes=round(recipe.cache.budget_gb * 10**9),
    )
