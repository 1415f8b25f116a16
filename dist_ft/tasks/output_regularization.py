"""Training losses that also look at how sure a model is, and whether it says the same twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_ft.tasks.base import Choice, LossSum


@dataclass(frozen=True)
class OutputRegularizer:
    """The training loss of a task with label smoothing and R-Drop; evaluation keeps the task's own.

    Attributes:
        loss: The task's loss.
        choices: The task's choices among classes.
        label_smoothing: Share of the target that all classes get alike (Szegedy et al. 2016).
        r_drop: Weight of the consistency of two forwards with other dropout (R-Drop, Liang et al.
            2021): the loss is the mean of both plus the weight times half their symmetric
            Kullback-Leibler divergence, as in the authors' code.
    """

    loss: Callable[[Any, Mapping[str, Tensor]], LossSum]
    choices: Callable[[Any, Mapping[str, Tensor]], list[Choice]]
    label_smoothing: float = 0.0
    r_drop: float = 0.0

    @property
    def forwards(self) -> int:
        """How often the model runs on a micro-batch."""
        return 2 if self.r_drop else 1

    def __call__(self, outputs: Sequence[Any], targets: Mapping[str, Tensor]) -> Tensor:
        """Return the summed loss of the forwards' outputs, float32 scalar."""
        total = torch.stack([self._plain(output, targets) for output in outputs]).mean()
        if not self.r_drop:
            return total
        first, second = (self.choices(output, targets) for output in outputs)
        return total + self.r_drop * symmetric_divergence(first, second)

    def _plain(self, outputs: Any, targets: Mapping[str, Tensor]) -> Tensor:
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
