"""DeepSpeed's configuration, a file or a section, as the keys of ``engine``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_ft.importing.draft import Draft
from dist_ft.importing.values import as_mapping, as_text, as_whole
from dist_ft.recipe.paths import exists

_ZERO = "deepspeed.zero_optimization"
# What the trainer's own keys say, too, and what changes nothing that is computed.
_TOLD_ELSEWHERE = {
    "zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps", "gradient_clipping", "fp16", "bf16", "bfloat16", "amp",
    "steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "activation_checkpointing",
}  # fmt: skip


def take_deepspeed(draft: Draft) -> None:
    """Translate the ZeRO stage and what is kept in the host's memory."""
    given = draft.take("deepspeed")
    if not given:
        draft.put("engine.zero_stage", 0 if draft.ranks == 1 else 2)
        return
    body = given if isinstance(given, Mapping) else _read(as_text(given, "deepspeed"), draft.folder)
    if body is None:
        found = re.search(r"(?:zero|z)[_-]?(\d)", str(given))
        stage = int(found[1]) if found else 2
        draft.put("engine.zero_stage", stage)
        draft.note(f"deepspeed {given!r} is not there to be read: zero_stage {stage} is a guess")
        return
    zero = as_mapping(body.get("zero_optimization") or {}, _ZERO)
    # DeepSpeed partitions nothing unless it is told to.
    draft.put("engine.zero_stage", as_whole(zero.get("stage") or 0, f"{_ZERO}.stage"))
    _take_offloads(draft, zero)
    for key in sorted(body.keys() - _TOLD_ELSEWHERE):
        draft.note(f"not translated: deepspeed.{key} = {body[key]!r}")


def _take_offloads(draft: Draft, zero: Mapping[str, Any]) -> None:
    for what in ("optimizer", "param"):
        key = f"{_ZERO}.offload_{what}"
        section = as_mapping(zero.get(f"offload_{what}") or {}, key)
        device = as_text(section.get("device") or "none", f"{key}.device")
        if what == "optimizer" and device == "cpu":
            draft.put("engine.offload_optimizer", True)
        elif device != "none":
            draft.note(f"not translated: {key}.device = {device!r}")


def _read(given: str, folder: Path) -> Mapping[str, Any] | None:
    path = folder / given
    if not exists(str(path)):
        return None
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"deepspeed: {path} is no JSON ({error}): mend it, or name another"
        ) from None
    return as_mapping(body, "deepspeed")
