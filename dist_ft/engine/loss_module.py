"""The module that an engine runs: the shared model followed by the task's loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from dist_ft.model.backbone import MultiTaskModel
from dist_ft.tasks.base import LossSum

LossFunction = Callable[[Any, Mapping[str, Tensor]], LossSum]


class LossModule(nn.Module):
    """Backbone, heads and losses in one module, so that ZeRO-3 gathers what they need."""

    def __init__(self, model: MultiTaskModel, losses: Mapping[str, LossFunction]) -> None:
        """Wrap `model`; `losses` maps each task's name to its summed loss."""
        super().__init__()
        self.model = model
        self._losses = dict(losses)

    def forward(
        self, task: str, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]
    ) -> tuple[Tensor, Any]:
        """Return the loss summed over the micro-batch (fp32 scalar) and, in eval mode, outputs."""
        outputs = self.model(task, dict(inputs))
        loss = self._losses[task](outputs, targets).sum
        # Outputs kept in training would keep their graph and be hooked by DeepSpeed.
        return loss, (None if self.training else outputs)
