"""Contradictions between a user's DeepSpeed JSON and the recipe, every one of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_ft.config import Recipe, TrainConfig
from dist_ft.recipe.errors import Finding, show_value
from dist_ft.recipe.validate import Draft

_PATH = ("engine", "deepspeed")
# Written by people who know the same files from other trainers: "take it from the recipe".
_AUTO = "auto"
# What the recipe's own sections decide; a second definition would be ignored or fight with it.
_OWNED = {
    "optimizer": "the optimizer is given by optim",
    "scheduler": "the learning rate is given by optim.schedule",
}
# Features that change what is trained behind the recipe's back.
_FOREIGN = (
    "amp",
    "compression_training",
    "curriculum_learning",
    "data_efficiency",
    "eigenvalue",
    "elasticity",
    "pipeline",
    "progressive_layer_drop",
    "quantize_training",
)


def check_deepspeed(draft: Draft, recipe: Recipe) -> Iterator[Finding]:
    """Yield every contradiction of the DeepSpeed JSON with the recipe, and of the engine's keys."""
    engine = recipe.engine
    if engine.offload_optimizer and engine.zero_stage == 0 and _sure(draft, "engine.zero_stage"):
        text = "needs zero_stage 1 or more, got true with zero_stage 0: raise zero_stage"
        yield Finding(("engine", "offload_optimizer"), text)
    if engine.offload_optimizer and recipe.mixture.tasks_per_step > 1 and engine.zero_stage > 1:
        text = (
            "DeepSpeed keeps the gradients of offloaded parameters from the last pass of a step "
            f"only, got true with mixture.tasks_per_step={recipe.mixture.tasks_per_step}: set that "
            "to 1, zero_stage to 1 or this to false"
        )
        if _sure(draft, "engine.zero_stage") and draft.is_sure("mixture"):
            yield Finding(("engine", "offload_optimizer"), text)
    if engine.precision == "fp16" and engine.zero_stage == 0 and _sure(draft, "engine.precision"):
        text = "fp16 needs zero_stage 1 or more, got zero_stage 0: raise it, or use bf16"
        yield Finding(("engine", "precision"), text)
    if engine.deepspeed is None or not draft.is_sure(*_PATH):
        return
    if engine.type == "reference":
        yield Finding(_PATH, f"the reference engine has none, got {_name(engine.deepspeed)}: drop")
        return
    try:
        config = _read(engine.deepspeed)
    except ValueError as error:
        yield Finding(_PATH, str(error))
        return
    name = engine.deepspeed.name
    for text in _contradictions(draft, recipe=recipe, config=config):
        yield Finding(_PATH, f"{name}: {text}")


def _contradictions(draft: Draft, *, recipe: Recipe, config: Mapping[str, Any]) -> Iterator[str]:
    for key, theirs, recipe_key, ours in _pairs(recipe, config):
        if theirs in (None, _AUTO) or not _sure(draft, recipe_key):
            continue
        if theirs != ours or isinstance(theirs, bool) != isinstance(ours, bool):
            rule = f"{key} must agree with {recipe_key} ({show_value(ours)})"
            yield f"{rule}, got {show_value(theirs)}: remove {key} from the file"
    yield from _accumulation(draft, recipe=recipe, theirs=config.get("gradient_accumulation_steps"))
    yield from _partitions(draft, recipe=recipe, config=config)
    for key, rule in _OWNED.items():
        if config.get(key) not in (None, _AUTO, {}):
            kind = _at(config, f"{key}.type")
            yield f"{rule}, got {key} {show_value(kind)}: remove {key} from the file"
    for key in _FOREIGN:
        section = config.get(key)
        if section and (not isinstance(section, dict) or section.get("enabled", True)):
            yield f"{key} is not known to the recipe, got it enabled: remove {key} from the file"


def _partitions(draft: Draft, *, recipe: Recipe, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the stage and the turns of a step do not go with."""
    if _at(config, "zero_optimization.offload_param.device") not in (None, "none") and (
        recipe.engine.zero_stage != 3 and _sure(draft, "engine.zero_stage")
    ):
        rule = "zero_optimization.offload_param needs engine.zero_stage 3"
        yield f"{rule}, got {recipe.engine.zero_stage}: remove it or raise the stage"
    if _at(config, "zero_optimization.overlap_comm") is True and recipe.engine.zero_stage == 1:
        turns = recipe.mixture.tasks_per_step
        if turns > 1 and _sure(draft, "engine.zero_stage") and draft.is_sure("mixture"):
            yield (
                "zero_optimization.overlap_comm in stage 1 adds up what the last pass of a step "
                f"reaches only, got true with mixture.tasks_per_step={turns}, so that the heads of "
                "other turns would differ between ranks: set it to false, or engine.zero_stage to 2"
            )


def _pairs(recipe: Recipe, config: Mapping[str, Any]) -> Iterator[tuple[str, Any, str, Any]]:
    """Yield key of the file, its value, key of the recipe, its value."""
    train, engine = recipe.train, recipe.engine
    simple = {
        "train_batch_size": ("train.global_batch_size", train.global_batch_size),
        "train_micro_batch_size_per_gpu": _micro_batch(train),
        "gradient_clipping": ("optim.max_grad_norm", recipe.optim.max_grad_norm),
        "zero_optimization.stage": ("engine.zero_stage", engine.zero_stage),
    }
    for key, (recipe_key, ours) in simple.items():
        yield key, _at(config, key), recipe_key, ours
    for key, precision in (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16")):
        enabled = _at(config, f"{key}.enabled")
        theirs = enabled if enabled in (None, _AUTO) else precision if enabled else "not it"
        if theirs == "not it":
            theirs = f"{key} off" if engine.precision == precision else None
        yield f"{key}.enabled", theirs, "engine.precision", engine.precision
    device = _at(config, "zero_optimization.offload_optimizer.device")
    offloads = device if device in (None, _AUTO) else device != "none"
    key = "zero_optimization.offload_optimizer"
    yield key, offloads, "engine.offload_optimizer", engine.offload_optimizer


def _micro_batch(train: TrainConfig) -> tuple[str, int | str]:
    if train.micro_batch_tokens is not None:
        return "train.micro_batch_tokens", f"{train.micro_batch_tokens} tokens"
    return "train.micro_batch_size", train.micro_batch_size


def _accumulation(draft: Draft, *, recipe: Recipe, theirs: Any) -> Iterator[str]:
    if theirs in (None, _AUTO) or not draft.is_sure("train"):
        return
    if recipe.train.micro_batch_tokens is not None:
        rule = "gradient_accumulation_steps differs from step to step with train.micro_batch_tokens"
        yield f"{rule}, got {show_value(theirs)}: remove it from the file"
        return
    micro_batches = recipe.train.global_batch_size // recipe.train.micro_batch_size
    if not isinstance(theirs, int) or theirs < 1 or micro_batches % theirs:
        yield (
            f"gradient_accumulation_steps must divide train.global_batch_size / "
            f"train.micro_batch_size ({micro_batches}), got {show_value(theirs)}: remove it from "
            "the file (it follows from the number of ranks)"
        )


def _read(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)
        raise ValueError(f"{reason}, got {str(path)!r}: correct the path") from None
    except ValueError as error:
        raise ValueError(f"must be JSON, got {_name(path)} ({error}): correct it") from None
    if not isinstance(config, dict):
        raise ValueError(f"must hold a JSON object, got {_name(path)}: correct it")
    return config


def _at(config: Mapping[str, Any], dotted: str) -> Any:
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _name(path: Path) -> str:
    return repr(path.name)


def _sure(draft: Draft, dotted: str) -> bool:
    return draft.is_sure(*dotted.split("."))
