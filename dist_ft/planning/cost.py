"""Arithmetic, traffic and time of a step under a stated roofline: pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_ft.planning.hardware import Hardware
from dist_ft.planning.memory import Setting, optimizer_bytes
from dist_ft.planning.shape import ModelShape, TaskWork

# Shares of the data sheets' peaks that well-tuned training reaches; stated beside every plan.
COMPUTE_EFFICIENCY = 0.45
LINK_EFFICIENCY = 0.75
# Seconds until a collective's first byte arrives, for each doubling of the ranks.
LATENCY_S = 10e-6
# What the host's cores of one rank read and write while they update offloaded state.
HOST_UPDATE_BYTES_PER_S = 10e9


@dataclass(frozen=True)
class Cluster:
    """Where a run is to go.

    Attributes:
        hardware: The accelerator.
        nodes: Machines.
        per_node: Accelerators of each.
    """

    hardware: Hardware
    nodes: int
    per_node: int

    @property
    def world_size(self) -> int:
        """Ranks, one for each accelerator."""
        return self.nodes * self.per_node

    @property
    def link_bytes_per_s(self) -> float:
        """What a ring over all ranks gets: its slowest link."""
        hardware = self.hardware
        return hardware.network_bytes_per_s if self.nodes > 1 else hardware.node_bytes_per_s


@dataclass(frozen=True)
class Flops:
    """Multiply-adds (counted as two) of one micro-batch on one rank."""

    forward: int
    backward: int
    recomputed: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.forward + self.backward + self.recomputed


@dataclass(frozen=True)
class Traffic:
    """What one rank sends in one optimizer step, ring collectives over all ranks.

    Attributes:
        reduced: Bytes of gradients.
        gathered: Bytes of parameters.
        messages: Collectives, for their latency.
    """

    reduced: int
    gathered: int
    messages: int


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step; nothing overlaps, as in the recipe's DeepSpeed settings."""

    compute_s: float
    communication_s: float
    optimizer_s: float

    @property
    def total_s(self) -> float:
        """Their sum."""
        return self.compute_s + self.communication_s + self.optimizer_s


def flops_of(
    shape: ModelShape, work: TaskWork, *, trainable: frozenset[str], setting: Setting
) -> Flops:
    """Return the arithmetic of one micro-batch of a task.

    The backward of a group that trains costs twice its forward; of a frozen one that the gradient
    passes through, once for its weights and twice between activations; below the lowest group
    that trains, nothing.
    """
    order = [g for g in shape.groups if g.name in work.groups]
    forward = backward = recomputed = 0
    reached = False
    for group in order:
        one = work.groups[group.name]
        trains = group.name in trainable and work.task in group.tasks
        forward += one.weight_flops + one.attention_flops
        below = reached
        reached = reached or trains
        if reached:
            backward += (2 if trains else 1) * one.weight_flops + 2 * one.attention_flops
        if reached and setting.checkpointing != "none" and group.name in shape.checkpointable:
            is_lowest = not below
            if not is_lowest or setting.checkpointing == "non_reentrant":
                recomputed += one.weight_flops + one.attention_flops
    scale = setting.micro_batch_size / work.rows
    return Flops(round(forward * scale), round(backward * scale), round(recomputed * scale))


def traffic_of(shape: ModelShape, *, trainable: frozenset[str], setting: Setting) -> Traffic:
    """Return what one rank sends in a step.

    Stages 0 and 1 reduce once in a step, 2 and 3 for every micro-batch. Stage 1 and 2 gather the
    updated parameters once. Stage 3 gathers all parameters, frozen ones too, for the forward of
    every micro-batch, and for the backward those from the lowest group that trains upwards.
    """
    world, size = setting.world_size, setting.element_bytes
    if world == 1:
        return Traffic(0, 0, 0)
    ring = (world - 1) / world
    trained = shape.numel_of(trainable) * size
    buckets = max(1, math.ceil(shape.numel_of(trainable) / 50_000_000))
    if setting.zero_stage == 0:
        return Traffic(round(2 * ring * trained), 0, buckets)
    times = setting.micro_batches if setting.zero_stage >= 2 else 1
    reduced = round(ring * trained * times)
    if setting.zero_stage < 3:
        return Traffic(reduced, round(ring * trained), buckets * (times + 1))
    names = [g.name for g in shape.groups]
    lowest = next((i for i, name in enumerate(names) if name in trainable), len(names))
    forward = shape.numel * size
    backward = sum(g.numel for g in shape.groups[lowest:]) * size
    gathers = setting.micro_batches * (2 * len(names) - lowest)
    gathered = round(ring * (forward + backward) * setting.micro_batches)
    return Traffic(reduced, gathered, gathers + buckets * times)


def step_time(
    shape: ModelShape, *, trainable: frozenset[str], setting: Setting, cluster: Cluster
) -> StepTime:
    """Return the seconds of a step, the mean over the tasks."""
    hardware = cluster.hardware
    peak = hardware.single_flops if setting.precision == "fp32" else hardware.half_flops
    works = [flops_of(shape, w, trainable=trainable, setting=setting).total for w in shape.work]
    flops = setting.micro_batches * sum(works) / max(1, len(works))
    # Every weight is read for each pass of each micro-batch, however few rows there are.
    weights = 3 * setting.micro_batches * shape.numel * setting.element_bytes
    compute = max(flops / (peak * COMPUTE_EFFICIENCY), weights / hardware.memory_bytes_per_s)
    traffic = traffic_of(shape, trainable=trainable, setting=setting)
    sent = traffic.reduced + traffic.gathered
    waits = traffic.messages * LATENCY_S * math.log2(max(2, setting.world_size))
    communication = sent / (cluster.link_bytes_per_s * LINK_EFFICIENCY) + waits
    return StepTime(compute, communication if setting.world_size > 1 else 0.0,
                    _optimizer_s(shape, trainable, setting, cluster))  # fmt: skip


def _optimizer_s(
    shape: ModelShape, trainable: frozenset[str], setting: Setting, cluster: Cluster
) -> float:
    """Seconds to read and write masters and moments once, over the host link if offloaded."""
    state = optimizer_bytes(shape, trainable=trainable, held=trainable, setting=setting)
    hardware = cluster.hardware
    if setting.offload_optimizer:
        # Gradients go down and weights come back, a sixth of the state each in half precision.
        moved = 2 * state * setting.element_bytes / 12
        return moved / hardware.host_bytes_per_s + 2 * state / HOST_UPDATE_BYTES_PER_S
    return 2 * state / hardware.memory_bytes_per_s
