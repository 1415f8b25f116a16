"""Schedules of the finetuning-scheduler as an explicit ``freezing`` section."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from dist_ft.importing.draft import Draft
from dist_ft.importing.values import as_list, as_mapping, as_text, as_whole

_BLOCK = re.compile(r"(?:layers?|h|blocks?)\\?\.(?:\(([\d|]+)\)|(\d+))")
_PARTS = (
    (r"embed|wte|wpe", "embeddings"),
    (r"classifier|score|qa_outputs|lm_head|\bhead", "head.*"),
    (r"pooler", "pooler"),
    (r"final_layer_norm|ln_f|\bnorm\b", "final_norm"),
)


def from_finetuning_scheduler(draft: Draft) -> None:
    """Translate the phases of a finetuning-scheduler YAML; each adds to those before.

    Its phases list parameters, ours layer groups: a block trains as a whole.
    """
    trainable: list[str] = ["head.*"]
    phases: list[dict[str, Any]] = []
    at = 0
    numbers = {as_whole(key, f"phase {key}"): key for key in draft.source}
    for number, key in sorted(numbers.items()):
        draft.used.add(key)
        phase = as_mapping(draft.source[key], f"phase {key}")
        for pattern in _patterns(phase, number):
            found = list(_groups(pattern))
            if not found:
                draft.note(f"phase {number}: {pattern!r} names no layer group that is known")
            trainable += [name for name in found if name not in trainable]
        phases.append({"at": f"{at}ep" if at else "0step", "trainable": list(trainable)})
        at = _end(draft, phase, number, at=at, is_last=number == max(numbers))
        if "lr" in phase:
            draft.note(f"phase {number}: lr = {phase['lr']}: use optim.lr, head_lr, layer_decay")
    draft.put("freezing", {"policy": "explicit", "phases": phases})
    draft.note("this is a `freezing` section only: put it into a recipe")


def _patterns(phase: Mapping[str, Any], number: int) -> list[str]:
    key = f"phase {number}.params"
    return [as_text(pattern, key) for pattern in as_list(phase.get("params") or [], key)]


def _end(draft: Draft, phase: Mapping[str, Any], number: int, *, at: int, is_last: bool) -> int:
    """Return the epoch in which a phase ends that begins in epoch `at`."""
    last = phase.get("max_transition_epoch")
    if last is not None:
        last = as_whole(last, f"phase {number}.max_transition_epoch")
        if last > at:
            return last
    if not is_last:
        draft.note(
            f"phase {number} ends by early stopping: it is given one epoch; the policy "
            "`plateau` also waits for the score"
        )
    return at + 1


def _groups(pattern: str) -> Iterator[str]:
    found = _BLOCK.search(pattern)
    if found:
        for index in (found[1] or found[2]).split("|"):
            yield f"block.{int(index)}"
        return
    for words, name in _PARTS:
        if re.search(words, pattern, re.IGNORECASE):
            yield name
            return
