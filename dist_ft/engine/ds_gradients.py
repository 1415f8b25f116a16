"""The gradients of ZeRO 1 and 2 on CPUs: each rank gets the sums that it keeps.

DeepSpeed copies every gradient into a bucket, all-reduces whole buckets when they are full while
the backward pass waits, and copies this rank's share out again. Here a gradient is sent from where
autograd has left it to the rank that holds its masters, while the backward pass goes on to the
layers below; and the forward and backward passes run without DeepSpeed's own hooks. The partitions
stay DeepSpeed's.
"""

from __future__ import annotations

import functools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from dist_ft.engine.exchange import sum_at_owners

# Gradients are sent together up to this many elements: enough to hide the latency of a message, and
# few enough that the first ones are on their way early.
BUNDLE = 1 << 20
# Elements of gradients that may be under way; beyond, the backward pass waits for the oldest.
_UNDER_WAY = 4 * BUNDLE
# Orders are compared as numbers below this: their squares, summed over ranks, are exact in fp64.
_ORDERS = 1 << 20


@dataclass(frozen=True)
class _Slice:
    """Elements `start` to `end` of a parameter, and where they begin in their owner's partition."""

    owner: int
    start: int
    end: int
    offset: int


@dataclass(frozen=True)
class _Place:
    """A parameter: its number, its DeepSpeed parameter group, and whose its elements are."""

    number: int
    group: int
    slices: Sequence[_Slice]


@dataclass
class _Bundle:
    """Gradients that are sent together.

    Attributes:
        slices: By the rank that owns them.
        targets: Of this rank's own slices: parameter group, and place in its partition.
        numel: Elements of all of them.
    """

    slices: list[list[Tensor]]
    targets: list[tuple[int, int]] = field(default_factory=list)
    numel: int = 0


class OwnedGradients:
    """Runs the passes of one engine and reduces what they leave into this rank's partitions.

    In stage 2 that happens in every pass, in stage 1 in the last one of a step. What is reduced
    lies in DeepSpeed's ``averaged_gradients`` until the optimizer's step: for each parameter group
    that had a gradient, flat tensors of this rank's part of each parameter, and padding.
    """

    def __init__(self, engine: Any) -> None:
        """Take the gradients of a fresh DeepSpeed engine over from its own hooks."""
        zero = engine.optimizer
        self._zero, self._every_pass = zero, bool(zero.partition_gradients)
        self._group: Any = zero.dp_process_group
        self._rank, self._world = dist.get_rank(self._group), dist.get_world_size(self._group)
        for handle in zero._grad_acc_hooks:
            handle.remove()
        zero._grad_acc_hooks.clear()
        self._parameters = [p for group in zero.bit16_groups for p in group]
        self._places = list(_places(zero, world_size=self._world))
        self._handles = [
            parameter.register_post_accumulate_grad_hook(functools.partial(self._arrived, place))
            for parameter, place in zip(self._parameters, self._places, strict=True)
        ]
        self._lengths = self._lengths_of_pieces()
        self._flats: dict[int, Tensor] = {}
        self._bundle = self._empty()
        self._under_way: deque[tuple[_Bundle, Callable[[], list[Tensor]]]] = deque()
        self._begun: Counter[int] = Counter()
        self._skipped: Counter[int] = Counter()
        self._open = False
        self._order = xxhash.xxh3_64()

    @classmethod
    def of(cls, engine: Any) -> OwnedGradients | None:
        """Return it for a fresh DeepSpeed engine, or None if DeepSpeed must reduce itself.

        That is the case in other stages, on a GPU, with an offloaded optimizer, for the mean of the
        ranks, where gradients are looked through for overflows (fp16), and where DeepSpeed's
        forward pass does something (``torch_autocast``).
        """
        zero = engine.optimizer
        if type(zero).__name__ != "DeepSpeedZeroOptimizer" or zero.cpu_offload:
            return None
        if zero.gradient_average or zero.dtype == torch.float16:
            return None
        if engine.torch_autocast_enabled():
            return None
        return cls(engine) if zero.bit16_groups_flat[0].is_cpu else None

    def close(self) -> None:
        """Let go of the parameters, which would hold each other through their hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Run a backward pass.

        One that ended in an error may be run again, with another loss that reaches the same
        parameters: what had been sent by then is not sent twice.

        Args:
            loss: Scalar. Its gradients are added up over passes and ranks.
            last: Whether the optimizer's step follows.
        """
        self._skipped = Counter(self._begun)
        self._open = last or self._every_pass
        loss.backward()
        if self._open:
            self._send_rest()
            self._send()
            while self._under_way:
                self._take()
            self._begun.clear()
            self._open = False
            if last:  # until their step, only DeepSpeed keeps them
                self._flats.clear()

    def take_order(self) -> int:
        """Return a number below 2**20 for the order in which gradients came since the last call."""
        order, self._order = self._order, xxhash.xxh3_64()
        return order.intdigest() % _ORDERS

    def _lengths_of_pieces(self) -> list[list[int]]:
        """Return the lengths of this rank's part of each parameter, and of padding, by group."""
        lengths: list[list[int]] = [[] for _ in self._zero.bit16_groups_flat]
        for place in self._places:
            own = [s for s in place.slices if s.owner == self._rank]
            lengths[place.group] += [s.end - s.start for s in own]
        for of_group, flat in zip(lengths, self._zero.bit16_groups_flat, strict=True):
            if padding := flat.numel() // self._world - sum(of_group):
                of_group.append(padding)
        return lengths

    def _empty(self) -> _Bundle:
        return _Bundle([[] for _ in range(self._world)])

    def _arrived(self, place: _Place, parameter: nn.Parameter) -> None:
        if not self._open:
            return
        if self._skipped[place.number]:
            self._skipped[place.number] -= 1
            return
        self._add(place, parameter)

    def _send_rest(self) -> None:
        """Add the gradients of earlier passes alone (stage 1): of a task of another turn."""
        for parameter, place in zip(self._parameters, self._places, strict=True):
            if parameter.grad is not None and not self._begun[place.number]:
                self._add(place, parameter)

    def _add(self, place: _Place, parameter: nn.Parameter) -> None:
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None  # from here on the bundle keeps it, until it is sent
        self._begun[place.number] += 1
        # A digest: blocks of 16 weights, in any order, give the same polynomial modulo 2**20.
        self._order.update(place.number.to_bytes(4, "little"))
        flat = gradient.reshape(-1).to(self._zero.communication_data_type)
        for part in place.slices:
            self._bundle.slices[part.owner].append(flat[part.start : part.end])
            if part.owner == self._rank:
                self._bundle.targets.append((place.group, part.offset))
        self._bundle.numel += flat.numel()
        if self._bundle.numel >= BUNDLE:
            self._send()

    def _send(self) -> None:
        if not self._bundle.numel:
            return
        bundle, self._bundle = self._bundle, self._empty()
        finish = sum_at_owners(bundle.slices, group=self._group)
        self._under_way.append((bundle, finish))
        while sum(b.numel for b, _ in self._under_way) > _UNDER_WAY and len(self._under_way) > 1:
            self._take()

    def _take(self) -> None:
        """Wait for the oldest bundle, and add its sums to this rank's partitions."""
        bundle, finish = self._under_way.popleft()
        for (group, offset), values in zip(bundle.targets, finish(), strict=True):
            flat = self._partition(group)
            flat[offset : offset + values.numel()].add_(values.to(flat.dtype))

    def _partition(self, group: int) -> Tensor:
        averaged = self._zero.averaged_gradients
        if averaged.get(group) is None:
            lengths = self._lengths[group]
            flat = torch.zeros(sum(lengths), dtype=self._zero.gradient_accumulation_dtype)
            # In pieces, as DeepSpeed's: the norm is added up piece by piece.
            averaged[group] = flat.split(lengths)
            self._flats[group] = flat
        return self._flats[group]


def check_order(total: float, squares: float) -> None:
    """Check that the gradients of all ranks came in one order, so that like was added to like.

    Where gradients of different sizes met, gloo has ended a process before this.

    Args:
        total: The sum of the ranks' orders.
        squares: The sum of their squares; with the number of ranks, it is the square of `total` if
            all orders are the same, and larger otherwise.

    Raises:
        RuntimeError: On every rank, if one had another order.
    """
    world_size = dist.get_world_size()
    if world_size * int(squares) != int(total) ** 2:
        raise RuntimeError(
            "the gradients of this step came in different orders on the ranks, so that they were "
            "not added up parameter by parameter. Nothing was updated. "
            "A module runs its layers in an order that depends on its data: use "
            "engine.zero_stage 0, which adds gradients up in the order of the parameters"
        )


def _places(zero: Any, *, world_size: int) -> Iterator[_Place]:
    """Return whose each parameter's elements are: of who holds them, by where they lie in memory.

    DeepSpeed lays the weights of a parameter group into one flat tensor and cuts it into as many
    equal partitions as there are ranks.
    """
    number = 0
    for group, parameters in enumerate(zero.bit16_groups):
        flat = zero.bit16_groups_flat[group]
        size = flat.numel() // world_size
        for parameter in parameters:
            first = (parameter.data.data_ptr() - flat.data_ptr()) // flat.element_size()
            end = first + parameter.numel()
            slices = [
                _Slice(owner, low - first, min(end, (owner + 1) * size) - first, low - owner * size)
                for owner in range(world_size)
                for low in [max(first, owner * size)]
                if low < min(end, (owner + 1) * size)
            ]
            yield _Place(number, group, slices)
            number += 1
