"""Bytes of one rank in a phase: pure arithmetic, the same that the engines do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dist_ft.engine.layout import partition_numel
from dist_ft.planning.shape import GroupShape, ModelShape, TaskWork

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
MOMENT_BYTES = 8  # AdamW: two fp32 values
MASTER_BYTES = 4
# DeepSpeed's defaults where neither recipe nor JSON says otherwise.
DEFAULT_BUCKET = 50_000_000
DEFAULT_LIVE = 1_000_000_000
DEFAULT_PERSISTENCE = 100_000
# What CUDA, NCCL and the libraries' kernels take before the first tensor.
FRAMEWORK_BYTES = 2**30
# Of the device: freed memory of the wrong size that the allocator can't give out again.
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Setting:
    """How a run is executed, as far as it changes memory, traffic or time.

    Attributes:
        world_size: Data-parallel ranks.
        zero_stage: 0 to 3.
        precision: Of parameters, gradients and activations.
        micro_batch_size: Rows.
        accumulation: Micro-batches of a rank in a turn, which is a global batch of one task.
        checkpointing: Recompute the activations of blocks.
        offload_optimizer: Masters and moments in host memory.
        switch: How phases change: ``in_place`` keeps the masters of all groups that ever train.
        averages: An average of the weights is kept.
        turns: Of a step, see ``mixture.tasks_per_step``.
        deepspeed: The ``zero_optimization`` section of the user's own JSON.
    """

    world_size: int
    zero_stage: int
    precision: Literal["fp32", "bf16", "fp16"]
    micro_batch_size: int
    accumulation: int
    checkpointing: Literal["none", "reentrant", "non_reentrant"] = "none"
    offload_optimizer: bool = False
    switch: Literal["rebuild", "in_place"] = "rebuild"
    averages: bool = False
    turns: int = 1
    deepspeed: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a rank in a step, over all its turns."""
        return self.accumulation * self.turns

    @property
    def element_bytes(self) -> int:
        """Bytes of a parameter, gradient or activation element."""
        return BYTES[self.precision]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank; ``host`` is not on the device.

    Attributes:
        parameters: Weights that the rank holds between steps.
        gradients: What is left of the gradients when the backward pass has ended.
        optimizer: fp32 masters and moments.
        activations: What autograd keeps of one micro-batch, at most over the tasks.
        buffers: Whole parameters gathered for computing (stage 3) and reduction buckets.
        framework: CUDA context, NCCL and kernels.
        host: Offloaded optimizer state; moments and masters of groups that trained before, and
            averages of those that do not train, at most.
        regularization: Starting weights for L2-SP and mixout, the true weights beside mixed ones,
            averages of the groups that train.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    framework: int
    host: int
    regularization: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return (
            self.parameters
            + self.gradients
            + self.optimizer
            + self.activations
            + self.buffers
            + self.framework
            + self.regularization
        )


def memory_of(
    shape: ModelShape,
    *,
    trainable: frozenset[str],
    universe: frozenset[str],
    setting: Setting,
    before: frozenset[str] = frozenset(),
    on_gpu: bool = True,
) -> Memory:
    """Return the bytes of one rank while `trainable` trains.

    Args:
        shape: The model.
        trainable: Layer groups that train now.
        universe: Layer groups that ever train.
        setting: How it is executed.
        before: Layer groups that may have trained before.
        on_gpu: Whether a CUDA context takes its share.
    """
    held = universe | trainable if setting.switch == "in_place" else trainable
    optimizer = optimizer_bytes(shape, trainable=trainable, held=held, setting=setting)
    away = optimizer if setting.offload_optimizer else 0
    averages, parked = average_bytes(shape, trainable=trainable, universe=universe, setting=setting)
    return Memory(
        parameters=parameter_bytes(shape, setting=setting),
        gradients=gradient_bytes(shape, trainable=trainable, held=held, setting=setting),
        optimizer=optimizer - away,
        activations=max(
            (activation_bytes(shape, w, trainable=trainable, setting=setting) for w in shape.work),
            default=0,
        ),
        buffers=buffer_bytes(shape, trainable=trainable, setting=setting),
        framework=FRAMEWORK_BYTES if on_gpu else 0,
        host=away + parked + parked_bytes(shape, before - trainable, held=held, setting=setting),
        regularization=averages + start_bytes(shape, trainable=trainable, setting=setting),
    )


def parameter_bytes(shape: ModelShape, *, setting: Setting) -> int:
    """Return the bytes of the weights that a rank holds: all, or in stage 3 its part of each."""
    world = setting.world_size if setting.zero_stage == 3 else 1
    elements = sum(-(-p.numel // world) for g in shape.groups for p in g.parameters)
    return elements * setting.element_bytes


def gradient_bytes(
    shape: ModelShape, *, trainable: frozenset[str], held: frozenset[str], setting: Setting
) -> int:
    """Return the bytes of the gradients that wait for the optimizer: all, or the rank's part.

    Args:
        shape: The model.
        trainable: Layer groups that train.
        held: Layer groups that the engine holds; those that don't train have zeros there (on a GPU;
            a CPU has none for them).
        setting: How it is executed. Stage 1 keeps whole gradients while it accumulates.
    """
    whole = shape.numel_of(trainable)
    if setting.zero_stage == 0:
        return setting.element_bytes * whole
    partition = _partitions(shape, held, setting)
    if setting.zero_stage == 1 and setting.micro_batches > 1:
        partition = max(partition, whole)
    return setting.element_bytes * partition


def optimizer_bytes(
    shape: ModelShape, *, trainable: frozenset[str], held: frozenset[str], setting: Setting
) -> int:
    """Return the bytes of AdamW's fp32 masters and moments.

    Without ZeRO, fp32 weights are their own masters; otherwise there is a copy.

    Args:
        shape: The model.
        trainable: Layer groups whose moments are there.
        held: Layer groups whose masters are there.
        setting: How it is executed.
    """
    moments = MOMENT_BYTES * _partitions(shape, trainable, setting)
    if setting.zero_stage == 0 and setting.precision == "fp32":
        return moments
    return moments + MASTER_BYTES * _partitions(shape, held, setting)


def parked_bytes(
    shape: ModelShape, names: frozenset[str], *, held: frozenset[str], setting: Setting
) -> int:
    """Return the bytes of state that waits on the host for the return of groups that trained.

    Their moments, and their masters if the engine holds them no more and they are not the weights.
    They wait with ``freezing.returning: reset`` too: it empties them when the groups come back.
    """
    parked = MOMENT_BYTES * _partitions(shape, names, setting)
    if setting.precision == "fp32":
        return parked
    return parked + MASTER_BYTES * _partitions(shape, names - held, setting)


def checkpoint_bytes(shape: ModelShape, *, universe: frozenset[str], setting: Setting) -> int:
    """Return the bytes of a checkpoint over all ranks, once all that ever trains has trained.

    Weights of everything; moments and averages of all groups that have trained, whether they do
    now or not; and masters where they are not the weights themselves.
    """
    each = MOMENT_BYTES + (0 if setting.precision == "fp32" else MASTER_BYTES)
    each += MASTER_BYTES * setting.averages
    return shape.numel * setting.element_bytes + each * shape.numel_of(universe)


def start_bytes(shape: ModelShape, *, trainable: frozenset[str], setting: Setting) -> int:
    """Return the bytes of the starting weights, and of the true ones that mixout puts aside.

    The first are there for all groups that L2-SP or mixout applies to, whether they train or not;
    the second, for the length of a step, for those that train.
    """
    elements = 0
    for group in shape.groups:
        for sizes in group.optimizer_groups:
            names = {name for name, _ in sizes}
            copies = bool(names & group.anchored)
            copies += bool(names & group.mixed) and group.name in trainable
            elements += copies * partition_numel(
                sizes, zero_stage=setting.zero_stage, world_size=setting.world_size
            )
    return elements * setting.element_bytes


def average_bytes(
    shape: ModelShape, *, trainable: frozenset[str], universe: frozenset[str], setting: Setting
) -> tuple[int, int]:
    """Return the bytes of fp32 averages of the weights, on the device and on the host.

    Those of groups that train are where the masters are; those of groups that trained before are
    on the host, where all of `universe` is the bound.
    """
    if not setting.averages:
        return 0, 0
    training = MASTER_BYTES * _partitions(shape, trainable, setting)
    parked = MASTER_BYTES * _partitions(shape, universe - trainable, setting)
    return (0, parked + training) if setting.offload_optimizer else (training, parked)


def _partitions(shape: ModelShape, names: frozenset[str], setting: Setting) -> int:
    """Elements of one rank's partitions of the groups, padding included."""
    return sum(
        partition_numel(sizes, zero_stage=setting.zero_stage, world_size=setting.world_size)
        for group in shape.groups
        if group.name in names
        for sizes in group.optimizer_groups
    )


def activation_bytes(
    shape: ModelShape, work: TaskWork, *, trainable: frozenset[str], setting: Setting
) -> int:
    """Return the bytes that the backward pass of one micro-batch of a task needs.

    Below the lowest group that trains nothing is kept. A block that is recomputed keeps what
    enters it; the largest of them is there in full while it is computed again.
    """
    order = [g for g in shape.groups if g.name in work.groups]
    mine = [i for i, g in enumerate(order) if g.name in trainable and work.task in g.tasks]
    if not mine:
        return 0
    total, largest = work.outside + work.loss_saved + work.loss_working, 0
    for index, group in enumerate(order):
        one = work.groups[group.name]
        kept = one.saved_trained if group.name in trainable else one.saved_passed
        if index < mine[0]:
            continue
        if _is_recomputed(group, index, lowest=mine[0], shape=shape, setting=setting):
            total, largest = total + one.entering, max(largest, kept)
        else:
            total += kept
    return (total + largest) * setting.micro_batch_size // work.rows


def _is_recomputed(
    group: GroupShape, index: int, *, lowest: int, shape: ModelShape, setting: Setting
) -> bool:
    """Return whether the engine recomputes a group (see ``engine.layer_modes``)."""
    if setting.checkpointing == "none" or group.name not in shape.checkpointable:
        return False
    # Re-entrant checkpointing needs an input with a gradient: something below must train.
    return index > lowest or setting.checkpointing == "non_reentrant"


def buffer_bytes(shape: ModelShape, *, trainable: frozenset[str], setting: Setting) -> int:
    """Return the bytes of reduction buckets and, in stage 3, of parameters that are whole."""
    trained = shape.numel_of(trainable)
    given = setting.deepspeed
    bucket = min(int(given.get("reduce_bucket_size", DEFAULT_BUCKET)), trained)
    elements = 0 if setting.world_size == 1 and setting.zero_stage == 0 else bucket
    if given.get("overlap_comm"):
        elements *= 2
    if setting.zero_stage == 3:
        elements += _gathered(shape, setting)
    return elements * setting.element_bytes


def _gathered(shape: ModelShape, setting: Setting) -> int:
    """Elements that are whole at once: small ones always, others up to the limit of live ones."""
    given = setting.deepspeed
    live = int(given.get("stage3_max_live_parameters", DEFAULT_LIVE))
    threshold = int(given.get("stage3_param_persistence_threshold", DEFAULT_PERSISTENCE))
    sizes = [p.numel for g in shape.groups for p in g.parameters]
    small = sum(n for n in sizes if n <= threshold)
    return min(sum(sizes), max(live, small + max(sizes, default=0)))
