"""The module that an engine runs: the shared model followed by the task's loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from dist_ft.engine.trunk_pass import TrunkPass
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
        with nullcontext() if way is None else way.running(inputs):
            outputs = self.model(task, dict(inputs))
        loss = self._losses[task](outputs, targets).sum
        # Outputs kept in training would keep their graph and be hooked by DeepSpeed.
        return loss, (None if self.training else outputs)
