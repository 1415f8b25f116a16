"""What the training loop needs of an engine, whoever executes the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from dist_ft.engine.turns import MicroBatchLike, Turn
from dist_ft.optim.averaging import Averaging

Precision = Literal["fp32", "bf16", "fp16"]
Switch = Literal["rebuild", "in_place"]
Returning = Literal["keep", "reset"]
DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class LossModule(Protocol):
    """The module that an engine runs: a forward pass that ends in a summed loss."""

    def __call__(
        self, task: str, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]
    ) -> tuple[Tensor, Any]:
        """Return the loss summed over the micro-batch's loss terms (fp32 scalar) and outputs."""
        ...


@dataclass(frozen=True)
class EngineOptions:
    """How an engine computes; the same on every rank.

    Attributes:
        precision: Of parameters and activations; masters and moments are always fp32.
        max_grad_norm: Global L2 norm that gradients are clipped to; 0 switches clipping off.
        betas: AdamW's decay rates.
        eps: AdamW's epsilon.
        seed: Dropout of micro-batch j in step s draws from (seed, s, j).
        returning: What a layer group finds when it trains again: its moments (`keep`) or zeros.
        activation_checkpointing: Recompute block activations in the backward pass.
        averaging: Which average of the weights is kept beside them; None for none.
        watch_shared: Whether steps measure each turn's gradient in what all tasks share.
    """

    precision: Precision = "fp32"
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    seed: int = 0
    returning: Returning = "keep"
    activation_checkpointing: Literal["none", "reentrant", "non_reentrant"] = "none"
    averaging: Averaging | None = None
    watch_shared: bool = False


@dataclass(frozen=True)
class PrefixCounts:
    """What a step found of the frozen prefix in the cache.

    Attributes:
        rows: Rows of this rank that start from a cached frozen prefix.
        found: Those of them for which the cache had the hidden states.
        wait_s: How long the step waited for them, seconds.
        parked_bytes: Weights of the prefix that were away from the device in this step.
    """

    rows: int = 0
    found: int = 0
    wait_s: float = 0.0
    parked_bytes: int = 0


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        loss: This rank's share of the global mean loss (fp32 scalar on the device): the sum over
            ranks is the mean over the global batch.
        grad_norm: Global L2 norm of the gradient before clipping; None when the engine has none,
            as after a step that was skipped because its fp16 gradients overflowed.
        turn_losses: Global mean loss of each turn, the same on every rank.
        turn_shares: This rank's share of each: the sum over ranks is the turn's loss.
        shared_norms: Global L2 norm of each turn's gradient in the topmost matrices that all tasks
            share, of the loss as it is weighed; None unless it was asked for.
        prefix: How much of the frozen prefix this rank found in the cache.
        refused: Why the update was left out, the same on every rank; None if it was made.
        lacked_memory: What this rank's device had no room for; the step is then refused.
    """

    loss: Tensor
    grad_norm: float | None
    refused: str | None = None
    lacked_memory: str | None = None
    prefix: PrefixCounts = PrefixCounts()
    turn_losses: tuple[float, ...] = ()
    turn_shares: tuple[float, ...] = ()
    shared_norms: tuple[float, ...] | None = None


@dataclass(frozen=True)
class PhaseReport:
    """What a phase change did, measured from the engine on this rank.

    Attributes:
        switch: How the engine changed.
        switch_s: Wall time of the change in seconds.
        trainable_params: Elements that train now.
        frozen_params: Elements that do not.
        optimizer_bytes: fp32 masters and moments of this rank on the training device.
        parked_bytes: Masters and moments of frozen groups kept on the host for their return.
        gradient_bytes: Bytes that the gradients of one micro-batch have on this rank.
        cached_blocks: Blocks of the frozen prefix whose hidden states are computed once and kept.
        cache_bytes: Bytes on this host's disk that they, and those of later phases, may take.
        anchor_bytes: Bytes of this rank's share of the starting weights, kept for L2-SP or mixout.
    """

    switch: Switch
    switch_s: float
    trainable_params: int
    frozen_params: int
    optimizer_bytes: int
    parked_bytes: int
    gradient_bytes: int
    cached_blocks: int = 0
    cache_bytes: int = 0
    anchor_bytes: int = 0


@dataclass(frozen=True)
class StateSlice:
    """A contiguous run of one parameter's elements with its optimizer state.

    Attributes:
        parameter: Name as in ``named_parameters()``.
        start: First element of the flattened parameter.
        values: ``weight`` in the parameter's dtype and, for groups that train or trained,
            ``master``, ``exp_avg``, ``exp_avg_sq`` (fp32) and, if one is kept, ``average``
            (fp32), each one-dimensional and as long.
    """

    parameter: str
    start: int
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class EngineState:
    """An engine's part of a checkpoint, in a form that no world size or ZeRO stage shows through.

    Attributes:
        slices: This rank's share; the shares of all ranks cover every parameter exactly once.
        steps: Updates that each parameter group has had.
        trainable: Layer groups that train.
        loss_scale: The dynamic loss scale of an fp16 run and its counters; empty without one.
        averaged: How many sets of weights are in the average of each parameter group that has one.
    """

    slices: list[StateSlice]
    steps: dict[str, int]
    trainable: tuple[str, ...]
    loss_scale: dict[str, float] = field(default_factory=dict)
    averaged: dict[str, int] = field(default_factory=dict)


class StateSource(Protocol):
    """Where an engine reads saved state from, piece by piece."""

    @property
    def steps(self) -> Mapping[str, int]:
        """Updates that each parameter group has had."""
        ...

    @property
    def loss_scale(self) -> Mapping[str, float]:
        """The dynamic loss scale and its counters; empty if none was saved."""
        ...

    @property
    def averaged(self) -> Mapping[str, int]:
        """How many sets of weights are in each parameter group's average."""
        ...

    def read(self, kind: str, parameter: str, *, start: int, length: int) -> Tensor | None:
        """Return `length` elements of a parameter's `kind`, or None if it was never saved."""
        ...


class Engine(Protocol):
    """Executes steps and phase changes.

    Attributes:
        before_change: Called before anything in `state` changes or moves; who copies the state
            beside the training waits here until it has it.
    """

    before_change: Callable[[], None]

    @property
    def module(self) -> nn.Module:
        """What is trained. Ask for it after each step: weights may come in until then."""
        ...

    def train_step(
        self,
        step: int,
        *,
        task: str,
        micro_batches: Sequence[MicroBatchLike],
        global_count: int,
        learning_rates: Mapping[str, float],
        loss_limit: float = math.inf,
        joined: Sequence[Turn] = (),
    ) -> StepResult:
        """Run one optimizer step over this rank's micro-batches.

        If the global loss or gradient is not finite, or the loss is above the limit, no rank
        updates anything: weights, moments and step counts stay.

        Args:
            step: Index of the step, from 0.
            task: The task that every rank runs in this step.
            micro_batches: As many on every rank.
            global_count: Loss terms of the global batch; the loss is their mean.
            learning_rates: By layer group.
            loss_limit: Largest global mean loss that is believed.
            joined: Further turns, of this or other tasks, whose gradients are accumulated with
                those of the first; the step's loss is the mean of the turns'.
        """
        ...

    def set_trainable(self, groups: Iterable[str], *, loads: bool = False) -> PhaseReport:
        """Train exactly these layer groups from the next step on.

        Args:
            groups: The layer groups.
            loads: Whether `load_state` comes next, which sets the phase's modes: for the present
                weights, the cache would delete what it keeps of those that are loaded.
        """
        ...

    def eval_forward(self, task: str, micro_batch: MicroBatchLike) -> tuple[Tensor, Any]:
        """Return summed loss and outputs without gradients, dropout off."""
        ...

    def own_seconds(self) -> float:
        """Return this rank's seconds in forward passes since the last call, without waiting."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Let forwards inside the context use the average of the weights, if one is kept."""
        ...

    def moment_norms(self) -> dict[str, float]:
        """Return the L2 norm of Adam's first moment by layer group that trains; on every rank."""
        ...

    def state(self) -> EngineState:
        """Return this rank's share of the state, as views: good until `before_change` returns."""
        ...

    def load_state(self, source: StateSource) -> None:
        """Take over saved weights, masters, moments and step counts; the phase must be set."""
        ...

    def full_weights(self) -> dict[str, Tensor]:
        """Return whole parameters by name on the host: on rank 0, elsewhere an empty dict."""
        ...

    def close(self) -> None:
        """Free weights and optimizer state; neither the engine nor its module is of use then."""
        ...


def nothing() -> None:
    """Do nothing: nobody waits for a change of the state."""


def free_weights(module: nn.Module) -> None:
    """Let go of the storage of all parameters, whoever still refers to them."""
    for parameter in module.parameters():
        vars(parameter).clear()
        parameter.grad = None
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)


def loss_problem(loss: float, *, limit: float) -> str | None:
    """Return what is wrong with a global mean loss, or None."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    return f"the loss is {loss:.4g}, above {limit:.4g}" if loss > limit else None


def gradient_problem(norm: float | None) -> str | None:
    """Return what is wrong with a global gradient norm, or None; DeepSpeed's sign for it is -1."""
    if norm is None or (math.isfinite(norm) and norm >= 0):
        return None
    return "the gradient is not finite"


def on_device(values: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the tensors on `device`; the copy overlaps with compute where memory is pinned."""
    return {name: value.to(device, non_blocking=True) for name, value in values.items()}


def seed_random_numbers(seed: int, device: torch.device) -> None:
    """Seed the random numbers of the CPU and of `device`.

    As ``torch.manual_seed`` does, which also tells every kind of device that is not there and
    keeps a stack trace for each: most of a millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def micro_batch_seed(seed: int, *, step: int, index: int) -> int:
    """Return the seed of a micro-batch's random numbers, a pure function of its position.

    splitmix64 (Steele et al. 2014) of the three integers, so that neighbouring steps share
    nothing.
    """
    mask = (1 << 64) - 1
    value = (
        seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + index * 0x94D049BB133111EB
    ) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return (value ^ (value >> 31)) & (mask >> 1)
