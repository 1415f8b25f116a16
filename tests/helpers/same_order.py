"""A one-process reference that adds and updates in the order of a ZeRO stage and world size."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ft.engine.ds_state import OwnerLayout, owner_layouts
from dist_ft.engine.ds_step import square_sum
from dist_ft.engine.element_counts import group_sizes
from dist_ft.optim.adamw import GroupAdamW
from tests.helpers.phases import Schedule
from tests.helpers.tiny import TASKS, TinyModel, global_batch, learning_rates, param_groups


class SameOrder:
    """Plain torch with the sums in the order of `stage` on `world_size` ranks, the norm's too.

    Micro-batch j is rank j modulo the world size's. AdamW runs over the vectors that the stage
    has it run over, because its vectorised kernel rounds the last elements of a vector otherwise.
    The gradient is clipped to `max_grad_norm`, unless that is 0.
    """

    def __init__(
        self, *, stage: int, world_size: int, max_grad_norm: float = 0.0, lr: float = 1e-2
    ) -> None:
        self.model = TinyModel()
        self._stage, self._world, self._limit = stage, world_size, max_grad_norm
        self._groups = param_groups(self.model, lr=lr)
        self._parameters = dict(self.model.named_parameters())
        self._sizes = sizes = group_sizes(self.model, self._groups)
        self._owners = [
            [
                (layout, torch.zeros(layout.numel))
                for rank in range(world_size if stage else 1)
                for layout in owner_layouts(
                    sizes[g.name], zero_stage=stage, rank=rank, world_size=world_size
                )
            ]
            for g in self._groups
        ]
        self._layer_group_of = {n: g.layer_group for g in self._groups for n in g.parameters}
        for layout, master in self._all_owners():
            for mine, its in self._pieces(layout, master, self._parameters):
                mine.copy_(its)
        self._optimizer = GroupAdamW(
            [
                {"params": [m for _, m in owners], "lr": 0.0, "weight_decay": g.weight_decay}
                for g, owners in zip(self._groups, self._owners, strict=True)
            ],
            betas=(0.9, 0.999),
            eps=1e-8,
        )

    def run(self, schedule: Schedule, *, steps: range, micro_batches: int) -> dict[str, Tensor]:
        """Run `steps`, changing phase where the schedule says; return the weights."""
        trainable: frozenset[str] = frozenset()
        for step in steps:
            trainable = frozenset(schedule.get(step, trainable))
            task = TASKS[step % len(TASKS)]
            active = [g.layer_group in trainable and task in g.tasks for g in self._groups]
            rates = learning_rates(self._groups, step)
            for group, settings, is_active in zip(
                self._groups, self._optimizer.param_groups, active, strict=True
            ):
                settings.update(lr=rates[group.layer_group], active=is_active)
            for name, parameter in self._parameters.items():
                parameter.requires_grad_(self._layer_group_of[name] in trainable)
            self._step(
                [i for i, is_active in enumerate(active) if is_active],
                task=task,
                batches=global_batch(step, micro_batches=micro_batches),
            )
        return {n: p.detach().clone() for n, p in self._parameters.items()}

    def _step(self, indices: Sequence[int], *, task: str, batches: Sequence[Any]) -> None:
        names = [n for i in indices for n in self._groups[i].parameters]
        count = sum(len(b.targets["y"]) for b in batches)
        parts = []
        for batch in batches:
            loss_sum, _ = self.model(task, batch.inputs, batch.targets)
            loss = loss_sum * (batch.loss_weight / count)
            parts.append(torch.autograd.grad(loss, [self._parameters[n] for n in names]))
        gradients = {n: self._total([p[i] for p in parts]) for i, n in enumerate(names)}
        if self._limit and self._stage == 0:
            self._clip_whole(gradients)
        for i in indices:
            for layout, master in self._owners[i]:
                master.grad = torch.zeros_like(master)
                for mine, its in self._pieces(layout, master.grad, gradients):
                    mine.copy_(its)
        if self._limit and self._stage:
            self._clip_partitions(indices)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for layout, master in self._all_owners():
            for mine, its in self._pieces(layout, master, self._parameters):
                its.copy_(mine)

    def _clip_whole(self, gradients: dict[str, Tensor]) -> None:
        """Clip as torch does; what the task's loss does not reach counts as zeros in its place."""
        training = {n: p for n, p in self._parameters.items() if p.requires_grad}
        for name, parameter in training.items():
            parameter.grad = gradients.get(name, torch.zeros_like(parameter))
        torch.nn.utils.clip_grad_norm_(list(training.values()), self._limit)
        for parameter in training.values():
            parameter.grad = None

    def _clip_partitions(self, indices: Sequence[int]) -> None:
        """Clip by the norm that the ranks find: of their parts, then of the ranks in order."""
        squares = [
            float(torch.stack([self._square(i, rank) for i in indices]).sum())
            for rank in range(self._world)
        ]
        norm = math.sqrt(sum(squares[1:], squares[0]))
        if self._stage == 3:  # by DeepSpeed, with a norm in fp32
            clip = ((torch.tensor(norm) + 1e-6) / self._limit).clamp(min=1.0)
            factor: Any = 1.0 / clip
        else:
            factor = min(1.0, self._limit / (norm + 1e-6))
        for i in indices:
            for _, master in self._owners[i]:
                assert master.grad is not None
                master.grad.mul_(factor)

    def _square(self, index: int, rank: int) -> Tensor:
        layout, master = self._owners[index][rank]
        assert master.grad is not None
        if self._stage == 3:
            lengths = [-(-n // self._world) for _, n in self._sizes[self._groups[index].name]]
        else:
            lengths = [p.length for p in layout.pieces]
            padding = layout.numel - sum(lengths)
            lengths += [padding] if padding else []
        return square_sum(master.grad.split(lengths))

    def _all_owners(self) -> list[tuple[OwnerLayout, Tensor]]:
        return [owner for owners in self._owners for owner in owners]

    @staticmethod
    def _pieces(layout: OwnerLayout, flat: Tensor, tensors: Any) -> list[tuple[Tensor, Tensor]]:
        return [
            (
                flat[p.offset : p.offset + p.length],
                tensors[p.parameter].detach().view(-1)[p.start : p.start + p.length],
            )
            for p in layout.pieces
        ]

    def _total(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the sum of one parameter's gradients of all micro-batches."""
        if self._stage < 2:  # every rank adds up its own, then the ranks are added
            return _sum([_sum(parts[rank :: self._world]) for rank in range(self._world)])
        # the ranks are added after every micro-batch
        rounds = range(0, len(parts), self._world)
        return _sum([_sum(parts[first : first + self._world]) for first in rounds])


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


def add_ranks_in_order() -> None:
    """Make this process add what the ranks reduce in the order of the ranks.

    Two addends have one sum; with four ranks gloo's ring adds every chunk of a buffer in an order
    of its own.
    """
    for name, source, target in (
        ("all_reduce", "tensor", "tensor"),
        ("reduce_scatter_tensor", "input", "output"),
    ):
        setattr(dist, name, _in_order(getattr(dist, name), source=source, target=target))


def _in_order(original: Any, *, source: str, target: str) -> Any:
    signature = inspect.signature(original)

    def ordered(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        value, result = given[source], given[target]
        if given.get("op", dist.ReduceOp.SUM) != dist.ReduceOp.SUM:
            return original(*args, **kwargs)
        world_size = dist.get_world_size()
        parts = [torch.empty_like(value) for _ in range(world_size)]
        dist.all_gather(parts, value.contiguous())
        total = _sum(parts)
        if source != target:
            total = total.chunk(world_size)[dist.get_rank()]
        result.copy_(total)
        return _Done()

    return ordered


class _Done:
    def wait(self) -> bool:
        return True
