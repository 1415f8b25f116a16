"""The optimizer step of ZeRO 1 and 2, with as few collectives and passes over memory as it needs.

DeepSpeed reduces the gradients into each rank's partition; what comes after them is done here.
Its own step has two collectives for each parameter group (one for the norm, one to gather the
weights) and looks at every gradient four times. With an optimizer group for each layer group that
is most of a step in which little trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ft.engine.ds_arriving import ArrivingWeights
from dist_ft.engine.exchange import gather
from dist_ft.optim.adamw import GroupAdamW

# Groups are stepped and gathered together up to this many elements of a rank's partition: enough to
# hide the latency of a message, and little beside the gradients in memory.
BUNDLE = 1 << 20
# torch adds up a norm in fp32 one element after the other, in as many lanes as a register has: over
# millions of elements that is off by 1e-4. Rows of this length are added up so, then they in fp64.
_ROW = 512


@dataclass
class PartitionedStep:
    """Clips, updates and gathers what DeepSpeed's ZeRO-1/2 optimizer has reduced.

    Attributes:
        zero: DeepSpeed's optimizer, whose attributes are not part of its interface; the distributed
            tests compare what comes of them with the reference.
        inner: Updates this rank's fp32 partitions.
        arriving: Gets the weights that other ranks have updated.
        layer_groups: The layer group of each parameter group.
    """

    zero: Any
    inner: GroupAdamW
    arriving: ArrivingWeights
    layer_groups: Sequence[str]

    @classmethod
    def of(
        cls,
        ds_engine: Any,
        *,
        inner: GroupAdamW,
        arriving: ArrivingWeights,
        layer_groups: Sequence[str],
    ) -> PartitionedStep | None:
        """Return the step for an engine, or None if DeepSpeed's own must be used.

        That is the case in other stages, with an offloaded optimizer, and where a loss scale is to
        be lowered (fp16).
        """
        zero = ds_engine.optimizer
        if type(zero).__name__ != "DeepSpeedZeroOptimizer" or zero.cpu_offload:
            return None
        if zero.dtype == torch.float16:
            return None
        return cls(zero, inner, arriving, tuple(layer_groups))

    @torch.no_grad()
    def square(self, indices: Sequence[int]) -> Tensor:
        """Return the sum of squares of this rank's share of the gradient (fp64 scalar).

        Args:
            indices: Parameter groups that have a gradient; that of all others is zero.
        """
        averaged = self.zero.averaged_gradients
        parts = [square_sum(averaged[i]) for i in indices if averaged.get(i) is not None]
        return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def apply(self, indices: Sequence[int], *, factor: float) -> None:
        """Update the parameter groups `indices`, begin to gather them and drop all gradients.

        Args:
            indices: The groups, in order; the same on every rank. Without any, nothing moves.
            factor: What the gradient is multiplied by: below 1 if it is clipped.
        """
        for bundle in self._bundles(self.arriving.in_order(indices, self.layer_groups)):
            for index in bundle:
                master = self._master(index)
                master.grad = self._gradient(index)
                if factor != 1.0:
                    master.grad.mul_(factor)
            self.inner.step_groups(bundle)
            for index in bundle:
                master = self._master(index)
                master.grad = None
                self._own_weights(index).copy_(master)
            self.arriving.add({self.layer_groups[i] for i in bundle}, self._gather(bundle))
        if not self.zero.bit16_groups_flat[0].is_cpu:
            self.arriving.settle()  # a GPU's forward pass would wait within what is measured of it
        self._drop_gradients()

    def _bundles(self, indices: Sequence[int]) -> Iterator[list[int]]:
        bundle: list[int] = []
        size = 0
        for index in indices:
            numel = self._master(index).numel()
            if bundle and size + numel > BUNDLE:
                yield bundle
                bundle, size = [], 0
            bundle.append(index)
            size += numel
        if bundle:
            yield bundle

    def _master(self, index: int) -> Tensor:
        return self.zero.single_partition_of_fp32_groups[index]

    def _own_weights(self, index: int) -> Tensor:
        """Return this rank's partition of a group's weights: a view of one flat buffer."""
        rank = dist.get_rank(self._group(index))
        return self.zero.parallel_partitioned_bit16_groups[index][rank]

    def _group(self, index: int) -> Any:
        return self.zero.real_dp_process_group[index]

    def _gradient(self, index: int) -> Tensor:
        """Return this rank's share of a group's gradient in the type of its master."""
        pieces: Sequence[Tensor] | None = self.zero.averaged_gradients.get(index)
        if pieces is None:  # nothing of the group took part in the step
            return torch.zeros_like(self._master(index))
        flat = torch.empty_like(self._master(index))
        for part, piece in zip(flat.split([p.numel() for p in pieces]), pieces, strict=True):
            part.copy_(piece.reshape(-1))
        self.zero.averaged_gradients[index] = None
        return flat

    def _gather(self, bundle: Sequence[int]) -> Callable[[], None]:
        """Begin to send this rank's weights and to receive the others'; return what ends it."""
        flats = [self.zero.bit16_groups_flat[index] for index in bundle]
        return gather(flats, group=self._group(bundle[0]))

    def _drop_gradients(self) -> None:
        for index in range(len(self.zero.bit16_groups)):
            self.zero.averaged_gradients[index] = None
            self.zero.all_grad_tensors[index] = None
        self.zero.zero_grad(set_to_none=True)
        self.zero.micro_step_id = -1  # of the step that begins with the next gradient


def hand_norm(zero: Any, norm: float) -> None:
    """Let DeepSpeed's ZeRO-3 optimizer take `norm` in its next step; it need not find its own."""
    zero._get_norm_groups = lambda: [torch.tensor(norm, dtype=torch.float32, device=zero.device)]


def square_sum(values: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares of tensors of any shapes: fp64 scalar, in an order of its own."""
    norms: list[Tensor] = []
    for value in values:
        flat = value.detach().reshape(-1)
        whole = flat.numel() - flat.numel() % _ROW
        if whole > _ROW:
            rows = flat[:whole].view(-1, _ROW)
            norms.append(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32))
            flat = flat[whole:]
        if flat.numel():
            norms.append(torch.linalg.vector_norm(flat, dtype=torch.float32).view(1))
    return torch.cat(norms).double().square().sum()
