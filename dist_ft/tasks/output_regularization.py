"""Training losses that also look at how sure a model is, and whether it says the same twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_ft.tasks.base import Choice, LossSum

# Log-probability of what is ruled out: nothing is left of its exponential, and it has a gradient.
_NEVER = -1e4
# Takes a forward's choices; returns what they add to the summed loss, float32 scalar.
OutputPenalty = Callable[[Sequence[Choice]], Tensor]


@dataclass(frozen=True)
class OutputRegularizer:
    """The training loss of a task with label smoothing; evaluation keeps the task's own.

    Attributes:
        loss: The task's loss.
        choices: The task's choices among classes.
        label_smoothing: Share of the target that all classes get alike (Szegedy et al. 2016).
        penalty: What a program adds.
    """

    loss: Callable[[Any, Mapping[str, Tensor]], LossSum]
    choices: Callable[[Any, Mapping[str, Tensor]], list[Choice]]
    label_smoothing: float = 0.0
    penalty: OutputPenalty | None = None

    def __call__(self, outputs: Any, targets: Mapping[str, Tensor]) -> Tensor:
        """Return the summed loss of a forward's outputs, float32 scalar."""
        loss = self._loss(outputs, targets)
        return loss if self.penalty is None else loss + self.penalty(self.choices(outputs, targets))

    def _loss(self, outputs: Any, targets: Mapping[str, Tensor]) -> Tensor:
        if not self.label_smoothing:
            return self.loss(outputs, targets).sum
        losses = [
            torch.nn.functional.cross_entropy(
                choice.logits.float(),
                choice.labels,
                label_smoothing=self.label_smoothing,
                reduction="sum",
            )
            for choice in self.choices(outputs, targets)
        ]
        return torch.stack(losses).mean()

    def divergence(self, one: Any, other: Any, targets: Mapping[str, Tensor]) -> Tensor:
        """Return half the symmetric Kullback-Leibler divergence of two forwards' outputs."""
        return symmetric_divergence(self.choices(one, targets), self.choices(other, targets))

    def jensen_shannon(self, one: Any, other: Any, targets: Mapping[str, Tensor]) -> Tensor:
        """Return the Jensen-Shannon divergence of two forwards' outputs."""
        return jensen_shannon(self.choices(one, targets), self.choices(other, targets))


def symmetric_divergence(first: Sequence[Choice], second: Sequence[Choice]) -> Tensor:
    """Return half the divergence of one set of choices from the other plus that back, in nats.

    It is summed over the choices of a set and the mean over sets, as a task's loss is.
    """
    sums = []
    for one, other in zip(first, second, strict=True):
        p, q = (c.logits.float().log_softmax(-1) for c in (one, other))
        # Classes that are ruled out have minus infinity in both, and no part in the difference.
        ruled_out = p.isneginf()
        difference = p.masked_fill(ruled_out, 0.0) - q.masked_fill(ruled_out, 0.0)
        sums.append(((p.exp() - q.exp()) * difference).sum() / 2)
    return torch.stack(sums).mean()


def jensen_shannon(first: Sequence[Choice], second: Sequence[Choice]) -> Tensor:
    """Return the mean divergence of two sets of choices from their mean, in nats.

    It is summed over the choices of a set and the mean over sets, as a task's loss is.
    """
    sums = []
    for one, other in zip(first, second, strict=True):
        p, q = (c.logits.float().log_softmax(-1) for c in (one, other))
        # A class that is ruled out has no part: of minus infinities even the gradient is NaN.
        out = p.isneginf() & q.isneginf()
        p, q = (logs.masked_fill(out, _NEVER) for logs in (p, q))
        middle = torch.logaddexp(p, q) - math.log(2)
        sums.append(torch.stack([(x.exp() * (x - middle)).sum() for x in (p, q)]).mean())
    return torch.stack(sums).mean()
