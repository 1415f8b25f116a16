"""Keeps a rank in step whose device has run out of memory, where nobody waits for it meanwhile.

A rank that leaves a step before its end would let the others wait in their next collective. So it
goes on with one row in the place of each micro-batch: that runs the same modules, so the same
collectives, and needs next to nothing. Its share of the loss is NaN, by which the ranks refuse the
step's update together; see `dist_ft.train.memory` for what they do then.

That holds where no collective of a micro-batch can have run before the error. In stage 3 each
module gathers its weights, and from stage 2 on the backward pass reduces gradients: the error goes
through, the process ends, and the ranks start again from the last checkpoint. In stage 1 the last
backward pass may do so too (on CPUs): what it had sent by then is not sent twice, so that the pass
of one row ends what it began; see `dist_ft.engine.ds_gradients`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_ft.engine.base import MicroBatchLike

# The first stage with collectives inside of a forward, and of a backward pass.
_FORWARD_STAGE, _BACKWARD_STAGE = 3, 2


@dataclass
class OneRow:
    """The first row of a micro-batch, which adds nothing; a `MicroBatchLike`."""

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    index: int
    rows: npt.NDArray[np.int64] = field(default_factory=lambda: np.arange(0))
    loss_weight: float = 0.0
    distinct: bool = False
    variants: npt.NDArray[np.int64] | None = None

    @classmethod
    def of(cls, batch: MicroBatchLike) -> OneRow:
        """Return the first row of `batch`."""
        return cls(
            {name: value[:1] for name, value in batch.inputs.items()},
            {name: value[:1] for name, value in batch.targets.items()},
            index=batch.index,
            rows=batch.rows[:1],
            variants=None if batch.variants is None else batch.variants[:1],
        )


@dataclass
class MemoryGuard:
    """Watches one step of this rank.

    Attributes:
        zero_stage: 0 to 3.
        overlaps: Whether DeepSpeed reduces gradients while the backward pass runs, in every stage.
        reducing: Whether others wait for this rank in the reduction that ends its backward pass.
        lacked: What did not fit, or None.
    """

    zero_stage: int = 0
    overlaps: bool = False
    reducing: bool = False
    lacked: str | None = None

    def run(
        self,
        batch: MicroBatchLike,
        *,
        forward: Callable[[MicroBatchLike], Tensor],
        backward: Callable[[Tensor], None],
    ) -> Tensor:
        """Run a micro-batch; return its share of the loss (fp32 scalar), NaN if it did not fit.

        Args:
            batch: The micro-batch.
            forward: Returns the share of the loss, with its graph.
            backward: Adds its gradient.

        Raises:
            torch.OutOfMemoryError: If others wait for this rank by now, or one row does not fit.
        """
        if self.lacked is None:
            loss = self._try(batch, forward=forward, backward=backward)
            if loss is not None:
                return loss
            # Only here the error, and with it every tensor of its frames, is gone.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        loss = forward(OneRow.of(batch))
        backward(loss)
        return loss.detach() * float("nan")

    def _try(
        self,
        batch: MicroBatchLike,
        *,
        forward: Callable[[MicroBatchLike], Tensor],
        backward: Callable[[Tensor], None],
    ) -> Tensor | None:
        where, first_stage = "forward", _FORWARD_STAGE
        try:
            loss = forward(batch)
            where, first_stage = "backward", 0 if self.overlaps else _BACKWARD_STAGE
            backward(loss)
            return loss.detach()
        except torch.OutOfMemoryError as error:
            if self.reducing or self.zero_stage >= first_stage:
                raise
            rows = len(next(iter(batch.inputs.values())))
            self.lacked = f"{where} pass of {rows} rows: {str(error).splitlines()[0]}"
            return None
