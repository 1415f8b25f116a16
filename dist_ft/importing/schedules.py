"""Schedules of the finetuning-scheduler as an explicit ``freezing`` section."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dist_ft.importing.draft import Draft

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
    for number in sorted(draft.source, key=int):
        draft.used.add(number)
        phase = draft.source[number]
        for pattern in phase.get("params", ()):
            found = list(_groups(str(pattern)))
            if not found:
                draft.note(f"phase {number}: {pattern!r} names no layer group that is known")
            trainable += [name for name in found if name not in trainable]
        phases.append({"at": f"{at}ep" if at else "0step", "trainable": list(trainable)})
        last = phase.get("max_transition_epoch")
        if last is None or int(last) <= at:
            at += 1
            if number != max(draft.source, key=int):
                draft.note(
                    f"phase {number} ends by early stopping: it is given one epoch; the policy "
                    "`plateau` also waits for the score"
                )
        else:
            at = int(last)
        if "lr" in phase:
            draft.note(f"phase {number}: lr = {phase['lr']}: use optim.lr, head_lr, layer_decay")
    draft.put("freezing", {"policy": "explicit", "phases": phases})
    draft.note("this is a `freezing` section only: put it into a recipe")


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
