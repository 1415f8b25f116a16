"""Small collectives by which the ranks prove that they do the same: at the start, and each step."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_ft import dist


class DisagreementError(RuntimeError):
    """Ranks that were about to do different things in the same step."""


def check_same_choices(own: Mapping[str, str]) -> None:
    """Check that all ranks will run the same code, where each has tested what it can run.

    Args:
        own: What this rank has chosen, by what it is chosen for.

    Raises:
        ValueError: On every rank, naming the ranks that differ from rank 0, their nodes and
            choices.
    """
    found = dist.all_gather_object((socket.gethostname(), dict(own)))
    host, first = found[0]
    others = [
        f"rank {rank} on {its_host} has {what} {chosen.get(what)}, not {first.get(what)}"
        for rank, (its_host, chosen) in enumerate(found)
        for what in first | chosen
        if chosen.get(what) != first.get(what)
    ]
    if others:
        raise ValueError(
            f"the ranks would not run what rank 0 on {host} runs: {'; '.join(others)}. A test of a "
            "kernel or of the model has failed on some: give all nodes the same hardware and "
            "packages, or set kernels: reference, model.padding: padded and cache.policy: off"
        )


@dataclass(frozen=True)
class StepPlan:
    """What a rank is about to do.

    Attributes:
        step: Optimizer step.
        task: The task of the step.
        micro_batches: Micro-batches of this rank.
        phase: Index of the phase that the step belongs to.
        trainable: Layer groups that are to train in the step.
        trainable_before: Layer groups that require a gradient now, read from the parameters.
    """

    step: int
    task: str
    micro_batches: int
    phase: int
    trainable: tuple[str, ...]
    trainable_before: tuple[str, ...]

    def fingerprint(self) -> int:
        """Return a 62-bit hash of the plan."""
        digest = hashlib.blake2b(repr(self).encode(), digest_size=8).digest()
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
    common = max(plans, key=plans.count)
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
    if plan.phase != common.phase:
        found.append(f"is in phase {plan.phase}, others in {common.phase}")
    found += _mask_differences(plan.trainable, common.trainable, verb="would train")
    found += _mask_differences(plan.trainable_before, common.trainable_before, verb="trains")
    return found


def _mask_differences(mine: Sequence[str], common: Sequence[str], *, verb: str) -> list[str]:
    extra = sorted(set(mine) - set(common))
    missing = sorted(set(common) - set(mine))
    parts = [f"{verb} {', '.join(extra)}, which others freeze"] if extra else []
    if missing:
        parts.append(f"{verb} all but {', '.join(missing)}, which others train")
    return parts
