"""Plain torch DistributedDataParallel, with `requires_grad` toggled by the user between steps."""

from __future__ import annotations

from functools import partial

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.freezing import tiny
from benchmarks.freezing.outcome import Case, Recorder, copy_of
from benchmarks.freezing.tiny import TinyTransformer


def load() -> None:
    """Import nothing more."""


def run(recorder: Recorder, *, freeze_first: bool) -> None:
    """Run the schedule, with the first mask set before or after the model is wrapped."""
    model = TinyTransformer(tasks=("a",))
    if freeze_first:
        tiny.set_trainable(model, tiny.THAW_AND_FREEZE[0].trainable)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = tiny.adamw(model.parameters())
    recorder.snapshots.append(copy_of(dict(model.named_parameters())))
    first = 0
    for span in tiny.THAW_AND_FREEZE:
        tiny.set_trainable(model, span.trainable)
        for step in range(first, first + span.steps):
            loss, _ = wrapped("a", *tiny.rank_batch(step, rank=dist.get_rank()))
            (loss / tiny.ROWS_PER_RANK).backward()
            optimizer.step()
            optimizer.zero_grad()
        first += span.steps
        recorder.snapshots.append(copy_of(dict(model.named_parameters())))


def schedule_cases() -> list[Case]:
    """Return the two orders of freezing and wrapping."""
    names = {
        True: ("torch DDP, first mask before wrapping", ""),
        False: ("torch DDP, all masks after wrapping", "all-reduces frozen layers too"),
    }
    return [
        Case(
            {"system": name, "setting": "find_unused_parameters", "precision": "fp32"},
            partial(run, freeze_first=freeze_first),
            note=note,
        )
        for freeze_first, (name, note) in names.items()
    ]
