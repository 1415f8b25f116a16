"""One small collective per step by which the ranks prove that they are doing the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from dist_ft import dist


class DisagreementError(RuntimeError):
    """Ranks that were about to do different things in the same step."""


@dataclass(frozen=True)
class StepPlan:
    """What a rank is about to do.

    Attributes:
        step: Optimizer step.
        task: The task of the step.
        trainable: Layer groups whose parameters require a gradient, read from the parameters.
        micro_batches: Micro-batches of this rank.
    """

    step: int
    task: str
    trainable: tuple[str, ...]
    micro_batches: int

    def fingerprint(self) -> int:
        """Return a 62-bit hash of the plan."""
        text = "\n".join([str(self.step), self.task, str(self.micro_batches), *self.trainable])
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 2


def agree(plan: StepPlan, *, stop: int) -> int:
    """Check that all ranks hold the same plan; return the largest `stop` of any rank.

    Equal hashes have the same largest and smallest value, so one all-reduce of three integers
    tells every rank the same answer, and all of them raise or none does.

    Args:
        plan: This rank's plan.
        stop: 0, or the number of the signal that asks this rank to stop.

    Raises:
        DisagreementError: Naming the ranks, the step and what differs, on every rank.
    """
    mine = plan.fingerprint()
    largest, negated, stop = dist.all_reduce_max([mine, -mine, stop])
    if largest != -negated:
        raise DisagreementError(describe(dist.all_gather_object(plan)))
    return stop


def describe(plans: Sequence[StepPlan]) -> str:
    """Return which ranks differ from the most common plan, and in what."""
    keys = [(p.step, p.task, p.micro_batches, p.trainable) for p in plans]
    common = plans[keys.index(max(keys, key=keys.count))]
    parts: list[str] = []
    for rank, plan in enumerate(plans):
        differences = _differences(plan, common)
        if differences:
            parts.append(f"rank {rank} {' and '.join(differences)}")
    return (
        f"ranks disagree at step {common.step}: {'; '.join(parts)}. All ranks must train the same "
        "layer groups on the same task; nothing was applied"
    )


def _differences(plan: StepPlan, common: StepPlan) -> list[str]:
    found: list[str] = []
    if plan.step != common.step:
        found.append(f"is at step {plan.step}")
    if plan.task != common.task:
        found.append(f"runs task {plan.task}, others {common.task}")
    if plan.micro_batches != common.micro_batches:
        found.append(f"has {plan.micro_batches} micro-batches, others {common.micro_batches}")
    extra = sorted(set(plan.trainable) - set(common.trainable))
    missing = sorted(set(common.trainable) - set(plan.trainable))
    if extra:
        found.append(f"trains {', '.join(extra)}, which others freeze")
    if missing:
        found.append(f"freezes {', '.join(missing)}, which others train")
    return found
