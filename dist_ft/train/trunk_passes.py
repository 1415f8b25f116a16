"""Decides how a recipe's model runs its blocks: without padding, and from a cached prefix on."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from dist_ft import dist
from dist_ft.config import MentionReplacementConfig, Recipe, TaskConfig
from dist_ft.data.bandit import BanditMixture
from dist_ft.data.loader import StepBatch
from dist_ft.engine.base import DTYPES
from dist_ft.engine.cache_probe import CacheDecision, CacheProbe
from dist_ft.engine.trunk_passes import TrunkPasses
from dist_ft.freezing.activation_cache import ActivationCache, CachedTask, cache_folder
from dist_ft.freezing.policies import ScheduledPolicy
from dist_ft.freezing.schedule import frozen_prefix
from dist_ft.model.backbone import MultiTaskModel
from dist_ft.model.trunk import Trunk
from dist_ft.tasks.question_answering import QuestionAnswering
from dist_ft.tasks.token_classification import TokenClassification
from dist_ft.train.augmentation import make_augmenter
from dist_ft.train.data import PreparedTask
from dist_ft.train.kernels import attention_dropout
from dist_ft.train.parts import Parts
from dist_ft.train.recorder import Recorder
from dist_ft.train.regularization import changes_hidden_states
from dist_ft.train.run_folder import RunFolder

# Where a run keeps what it has found out about the cache, so that it does not decide anew.
DECISION = "cache.json"
# How often a row must come, on average, while some prefix is frozen, to be worth keeping.
_LEAST_VISITS = 1.25
# Tasks whose losses read no logits of padding; one derived from them may. A generating head may
# compute its loss itself, from hidden states among their padding.
_PER_TOKEN = (TokenClassification, QuestionAnswering)
# Settings by which transformers' models limit how far a token sees.
_WINDOWS = (
    "sliding_window", "sliding_window_size", "local_attention", "attention_window",
    "attention_chunk_size",
)  # fmt: skip


def make_passes(
    recipe: Recipe,
    parts: Parts,
    *,
    folder: RunFolder,
    device: torch.device,
    say: Callable[[str], None],
    recorder: Recorder,
) -> TrunkPasses:
    """Return how micro-batches go through the model's blocks; the model is not wrapped yet.

    Args:
        recipe: The recipe.
        parts: What it asks for.
        folder: Of the run.
        device: Where the model will be.
        say: Tells the user.
        recorder: Hears whether the cache pays.

    Raises:
        ValueError: If the recipe insists on what the model can't do.
    """
    wants_cache = _wants_cache(recipe, parts)
    if wants_cache and (reason := changes_hidden_states(recipe)):
        say(f"the frozen prefix is not cached: {reason}")
        wants_cache = False
    if recipe.model.padding == "padded" and not wants_cache:
        return TrunkPasses()
    if any(t.takes != "text" for t in recipe.tasks):
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
    if trunk.flat and recipe.kernels != "reference":
        per_token = {t.task.name for t in parts.tasks if type(t.task) in _PER_TOKEN}
        trunk.fit_to_heads(parts.model, per_token=per_token)
    passes = TrunkPasses(
        trunk=trunk,
        order=tuple(g.name for g in parts.groups if g.kind != "head"),
        parameters={g.name: g.parameters for g in parts.groups},
    )
    visits = row_visits(recipe, parts) if wants_cache else {}
    if visits and "boundary" not in problems:
        if isinstance(parts.policy, ScheduledPolicy):
            passes.schedule = tuple(frozenset(p.trainable) for p in parts.policy.phases)
        passes.drop_prefix = recipe.cache.drop_prefix
        passes.cache = _cache(recipe, parts, tasks=visits.keys(), folder=folder, width=trunk.width)
        if recipe.cache.policy == "auto":
            _measure(passes, visits=visits, folder=folder, recorder=recorder, say=say)
    return passes


def _measure(
    passes: TrunkPasses,
    *,
    visits: Mapping[str, float],
    folder: RunFolder,
    recorder: Recorder,
    say: Callable[[str], None],
) -> None:
    """Let the first steps decide whether the cache is used, or the run's own earlier decision."""
    path = folder.root / DECISION
    known = dist.broadcast_object(_decided(path) if dist.rank() == 0 else None)
    if known is not None:
        passes.decision = CacheDecision(**known)
        return

    def tell(decision: CacheDecision) -> None:
        used = decision.pays(decision.boundary)
        if dist.rank() == 0:
            # Before the step that follows it: a run that goes on must not decide otherwise.
            try:
                folder.write_json(DECISION, asdict(decision))
            except OSError as error:
                say(f"WARNING: the decision about the cache is not kept ({error})")
        recorder.event("cache", used=used, **asdict(decision))
        say(f"step {decision.step}: {_figures(decision)}: the cache is {'' if used else 'not '}used"
            f"{'' if used else ' (cache.policy: on insists)'}")  # fmt: skip

    passes.probe = CacheProbe(sum(visits.values()) / len(visits))
    passes.tell = tell


def _decided(path: Path) -> dict[str, Any] | None:
    """Return the run's earlier decision, if it has one that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _figures(decision: CacheDecision) -> str:
    place = "the disk" if decision.from_disk else "memory"
    read = "was not kept" if decision.read_s is None else (
        f"{1e6 * decision.read_s:.2f} us to read from {place}"
    )  # fmt: skip
    return (
        f"a token of the frozen prefix ({decision.boundary} blocks) takes "
        f"{1e6 * decision.compute_s:.2f} us to compute, {1e6 * decision.write_s:.2f} us to write "
        f"once and {read}; a row comes {decision.visits:.1f} times"
    )


def reads_ahead(
    passes: TrunkPasses, *, turns: int, device: torch.device
) -> Callable[[StepBatch], None]:
    """Return what reads the kept rows of each batch that the loader has made, in its thread.

    Args:
        passes: How rows go through the model.
        turns: Of a step; batches come turn by turn.
        device: Where the model is.
    """

    def read(batch: StepBatch) -> None:
        step, turn = divmod(batch.step, turns)
        pin = device.type == "cuda"
        passes.read_ahead(
            step, turn=turn, task=batch.task, micro_batches=batch.micro_batches, pin=pin
        )

    return read


def _wants_cache(recipe: Recipe, parts: Parts) -> bool:
    """Return whether some phase has blocks of a frozen prefix, and the recipe lets them be kept."""
    if recipe.cache.policy == "off" or not any(_repeats(t, recipe) for t in recipe.tasks):
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
    longest = max(t.max_length for t in recipe.tasks)
    windows = _windows(parts.model)
    if windows and min(windows) < longest:
        return f"its tokens see {min(windows)} others and rows may have {longest} tokens"
    dropout = attention_dropout(recipe, parts.model, groups=parts.groups)
    if device.type == "cuda" and recipe.model.padding == "auto" and dropout > 0:
        return "torch's attention for rows without padding has no dropout on GPUs"
    return None


def _windows(model: MultiTaskModel) -> list[int]:
    """Return how many tokens a token sees, wherever a part of the backbone has such a limit.

    A probe of a few short rows would not meet it.
    """
    modules = list(model.backbone.modules())
    owners: list[Any] = [*modules, *(getattr(module, "config", None) for module in modules)]
    values = [getattr(owner, name, None) for owner in owners for name in _WINDOWS]
    return [value for value in values if isinstance(value, int)]


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


def _repeats(task: TaskConfig, recipe: Recipe) -> bool:
    """Return whether a task's rows come again as they were."""
    return not task.augmentation or recipe.cache.variants is not None


def row_visits(recipe: Recipe, parts: Parts) -> dict[str, float]:
    """Return how often a row comes while a prefix is frozen, for tasks whose rows are to be kept.

    Unless the recipe insists, a task whose rows hardly come again is left out: a row that comes
    once costs a write and is never read. Each augmented version of a row counts as a row.
    """
    steps = _steps_with_prefix(parts)
    size = recipe.train.global_batch_size
    found: dict[str, float] = {}
    for index, (config, t) in enumerate(zip(recipe.tasks, parts.tasks, strict=True)):
        if isinstance(parts.mixture, BanditMixture):  # which decides as it goes
            own = sum(end - start for start, end in steps) / len(parts.tasks)
        else:
            before = parts.mixture.steps_before
            own = sum(
                before(end * parts.turns)[index] - before(start * parts.turns)[index]
                for start, end in steps
            )
        visits = own * size / (len(t.datasets["train"]) * _variants(config, recipe))
        pays = recipe.cache.policy == "on" or visits >= _LEAST_VISITS
        if _repeats(config, recipe) and pays:
            found[t.task.name] = visits
    return found


def _variants(task: TaskConfig, recipe: Recipe) -> int:
    return recipe.cache.variants or 1 if task.augmentation else 1


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
    recipe: Recipe, parts: Parts, *, tasks: Collection[str], folder: RunFolder, width: int
) -> ActivationCache:
    return ActivationCache(
        # Of one host: processes of several may not write into one file of a network file system.
        cache_folder(folder.root, elsewhere=recipe.cache.dir) / (platform.node() or "host"),
        tasks={
            t.task.name: cached_task(config, t, recipe)
            for config, t in zip(recipe.tasks, parts.tasks, strict=True)
            if t.task.name in tasks
        },
        width=width,
        dtype=DTYPES[recipe.engine.precision],
        budget_bytes=round(recipe.cache.budget_gb * 10**9),
    )


def cached_task(config: TaskConfig, prepared: PreparedTask, recipe: Recipe) -> CachedTask:
    """Return what the cache must know of a task: the room of its rows, and what they follow from.

    Args:
        config: The task in the recipe.
        prepared: The task and its rows.
        recipe: The recipe.
    """
    data = prepared.datasets["train"]
    lengths = data.lengths.astype(np.int64)
    room, variants = lengths, _variants(config, recipe)
    about = [data.manifest.dataset_id]
    if config.augmentation:
        # Changed words may have more tokens. What needs more room than this is computed each time.
        room = np.maximum(lengths, np.minimum(config.max_length, lengths + lengths // 2 + 8))
        transforms = [t.model_dump(mode="json") for t in config.augmentation]
        # A word list may hold other words under the same path; mentions follow from the data.
        listed = [t for t in config.augmentation if not isinstance(t, MentionReplacementConfig)]
        augmenter = make_augmenter(listed, config=config, task=prepared.task, dataset=data)
        about += [json.dumps([transforms, augmenter.describe()], sort_keys=True)]
        about += [str(recipe.seed), str(variants)]
    return CachedTask(room, variants, xxhash.xxh3_64_hexdigest("|".join(about).encode()))
