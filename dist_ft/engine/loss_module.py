"""The module that an engine runs: the shared model followed by the task's loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dist_ft.engine.objective import Objective, PassMemory
from dist_ft.engine.trunk_pass import TrunkPass
from dist_ft.model.backbone import MultiTaskModel
from dist_ft.model.embedding_noise import EmbeddingNoise
from dist_ft.model.scoring_head import ScoringHead
from dist_ft.tasks.base import LossSum

LossFunction = Callable[[Any, Mapping[str, Tensor]], LossSum]


@dataclass(frozen=True)
class FusedLoss:
    """A loss that a task's head computes itself, so that its logits never exist as a whole.

    Attributes:
        head: The head.
        labels: Returns the class of each place of the logits, of what the loss needs.
        label_smoothing: Share of the target that all classes get alike.
    """

    head: ScoringHead
    labels: Callable[[Mapping[str, Tensor]], Tensor]
    label_smoothing: float = 0.0

    def scoring(self, targets: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Let the model return the summed loss as its logits inside the context."""
        return self.head.scoring(self.labels(targets), label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class InTraining:
    """What is different while a model trains.

    Attributes:
        losses: Losses by task that take the place of the task's own.
        noise: On the word embeddings.
        noisy: Tasks that get the noise.
        weights: What a task's loss weighs, in its gradient and where it is reported; 1 for others.
            Tuned, fixed weights match costlier balancers (Kurin et al. 2022).
        fused: Tasks whose head computes the loss, in place of the task or of `losses`.
        whole_logits: Tasks whose head doesn't, as `losses` look at all of their logits.
    """

    losses: Mapping[str, Objective] = field(default_factory=dict)
    noise: EmbeddingNoise | None = None
    noisy: frozenset[str] = frozenset()
    weights: Mapping[str, float] = field(default_factory=dict)
    fused: Mapping[str, FusedLoss] = field(default_factory=dict)
    whole_logits: frozenset[str] = frozenset()


class LossModule(nn.Module):
    """Backbone, heads and losses in one module, so that ZeRO-3 gathers what they need."""

    def __init__(
        self,
        model: MultiTaskModel,
        losses: Mapping[str, LossFunction],
        *,
        in_training: InTraining | None = None,
    ) -> None:
        """Wrap `model`; `losses` maps each task's name to its summed loss."""
        super().__init__()
        self.model = model
        self._losses = dict(losses)
        self._in_training = in_training or InTraining()
        self._memory = PassMemory()

    def passes(self, task: str) -> int:
        """Return how often the next micro-batch is to go forward and backward."""
        self._memory = PassMemory()
        special = self._in_training.losses.get(task)
        return 1 if special is None else special.passes

    def forward(
        self,
        task: str,
        inputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        way: TrunkPass | None = None,
    ) -> tuple[Tensor, Any]:
        """Return the loss summed over the micro-batch (fp32 scalar) and, in eval mode, outputs.

        Args:
            task: The task.
            inputs: Keyword arguments of its model.
            targets: What its loss needs.
            way: How the trunk is run; None as transformers made it.
        """
        extra = self._in_training
        fuses = self.training and task not in extra.whole_logits
        fused = extra.fused.get(task) if fuses else None
        special = extra.losses.get(task) if self.training and fused is None else None
        if way is not None and special is not None and special.mixup is not None:
            way.trunk.prepare(None)  # rows of other lengths can only be mixed side by side
            way = None
        with ExitStack() as stack:
            if way is not None:
                # Entered once: two forwards start from the same cached prefix.
                stack.enter_context(way.running(inputs, task=task))
            if self.training and extra.noise is not None and task in extra.noisy:
                stack.enter_context(extra.noise.active(inputs))
            weight = extra.weights.get(task, 1.0) if self.training else 1.0
            if fused is not None:
                stack.enter_context(fused.scoring(targets))
            elif special is not None:
                loss = special(
                    lambda: self.model(task, dict(inputs)), inputs, targets, memory=self._memory
                )
                return weight * loss, None
            outputs = self.model(task, dict(inputs))
        if fused is not None:
            return weight * outputs["logits"], None
        loss = weight * self._losses[task](outputs, targets).sum
        # Outputs kept in training would keep their graph and be hooked by DeepSpeed.
        return loss, (None if self.training else outputs)
