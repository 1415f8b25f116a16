"""The shape of a model as planning needs it: sizes of parameters, and what a forward keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class ParameterShape:
    """One parameter.

    Attributes:
        name: As in ``named_parameters()``.
        numel: Elements.
        decays: Whether weight decay applies (matrices), which decides its optimizer group.
        fixed: Whether it never trains, as a weight beside an adapter.
    """

    name: str
    numel: int
    decays: bool
    fixed: bool = False


@dataclass(frozen=True)
class GroupShape:
    """One layer group.

    Attributes:
        name: Of the layer group.
        kind: ``embeddings``, ``block``, ``head`` and so on.
        tasks: Tasks whose loss reaches it.
        parameters: Its parameters in the model's order.
        anchored: Names of those whose starting values are kept, for L2-SP or mixout.
        mixed: Names of those that mixout replaces in a step.
    """

    name: str
    kind: str
    tasks: frozenset[str]
    parameters: tuple[ParameterShape, ...]
    anchored: frozenset[str] = frozenset()
    mixed: frozenset[str] = frozenset()

    @cached_property
    def numel(self) -> int:
        """Elements of all its parameters."""
        return sum(p.numel for p in self.parameters)

    @cached_property
    def trained_numel(self) -> int:
        """Elements of those that train when the group does."""
        return sum(p.numel for p in self.parameters if not p.fixed)

    @property
    def freezing_kind(self) -> str:
        """The kind as schedules see it: a group of which nothing can train is ``unused``."""
        return self.kind if self.trained_numel else "unused"

    @cached_property
    def optimizer_groups(self) -> list[list[tuple[str, int]]]:
        """Name and elements of each of its optimizer groups' parameters."""
        both = (
            [(p.name, p.numel) for p in self.parameters if p.decays and not p.fixed],
            [(p.name, p.numel) for p in self.parameters if not p.decays and not p.fixed],
        )
        return [group for group in both if group]


@dataclass(frozen=True)
class GroupWork:
    """What a layer group does in the forward of one micro-batch.

    Attributes:
        saved_trained: Bytes that autograd keeps for the backward if the group trains.
        saved_passed: Bytes if the gradient only passes through it to something below.
        entering: Bytes of the hidden states that enter it, kept if it is recomputed.
        weight_flops: Multiply-adds (counted as two) with weights.
        attention_flops: Multiply-adds between activations.
    """

    saved_trained: int = 0
    saved_passed: int = 0
    entering: int = 0
    weight_flops: int = 0
    attention_flops: int = 0


@dataclass(frozen=True)
class TaskWork:
    """What a step of a task does with one micro-batch.

    Attributes:
        task: Name of the task.
        rows: Rows of the micro-batch that the numbers are of.
        tokens: Positions of the micro-batch, padded to the task's `max_length`.
        groups: By layer group, in the order of execution.
        outside: Bytes kept by what belongs to no layer group (masks, rotary tables).
        loss_saved: Bytes that the loss keeps.
        loss_working: Bytes that computing the loss needs for a moment on top.
    """

    task: str
    rows: int
    tokens: int
    groups: Mapping[str, GroupWork]
    outside: int = 0
    loss_saved: int = 0
    loss_working: int = 0


@dataclass(frozen=True)
class ModelShape:
    """A model with its tasks.

    Attributes:
        source: Where the shape was read from, in words.
        groups: Layer groups, bottom to top.
        work: One for each task.
        checkpointable: Layer groups that activation checkpointing recomputes.
        notes: What could not be planned and why.
    """

    source: str
    groups: tuple[GroupShape, ...]
    work: tuple[TaskWork, ...]
    checkpointable: frozenset[str]
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def numel(self) -> int:
        """Parameters of backbone and heads."""
        return sum(g.numel for g in self.groups)

    def numel_of(self, names: frozenset[str]) -> int:
        """Return the parameters of some layer groups."""
        return sum(g.trained_numel for g in self.groups if g.name in names)
