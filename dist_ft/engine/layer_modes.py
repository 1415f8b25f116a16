"""Modes of the layers that depend on the phase: dropout of the frozen prefix, recomputation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from dist_ft.model.backbone import MultiTaskModel
from dist_ft.model.layer_groups import LayerGroup

Checkpointing = Literal["none", "reentrant", "non_reentrant"]


def frozen_prefix(order: Sequence[str], trainable: frozenset[str]) -> list[str]:
    """Return the layer groups below the lowest one that trains."""
    prefix: list[str] = []
    for name in order:
        if name in trainable:
            break
        prefix.append(name)
    return prefix


@dataclass
class LayerModes:
    """Applies what a phase means to the modules of the backbone's layer groups.

    A frozen prefix needs no gradient, so autograd records nothing for it and its activations are
    not kept. Re-entrant activation checkpointing has a trap there: a checkpointed block whose
    input needs no gradient gets none for its own parameters either, without a word. Blocks are
    therefore recomputed only where something below them trains.

    Attributes:
        order: Backbone layer groups from the bottom to the top.
        modules: The modules that hold each layer group's parameters.
        checkpointing: Recompute the activations of blocks in the backward pass.
        prefix_dropout: Whether a frozen prefix keeps its dropout (as plain fine-tuning does).
    """

    order: tuple[str, ...] = ()
    modules: Mapping[str, Sequence[nn.Module]] = field(default_factory=dict)
    checkpointing: Checkpointing = "none"
    prefix_dropout: bool = True
    _prefix: list[str] = field(default_factory=list)

    @classmethod
    def none(cls) -> LayerModes:
        """Return modes that change nothing."""
        return cls()

    @classmethod
    def of(
        cls,
        model: MultiTaskModel,
        *,
        groups: Sequence[LayerGroup],
        checkpointing: Checkpointing,
        prefix_dropout: bool,
    ) -> LayerModes:
        """Return the modes of `model`, whose parameters `groups` name."""
        backbone = [g for g in groups if g.kind != "head"]
        if checkpointing != "none":
            # Gives every block that can recompute the function to do it with; `apply` says which.
            backbone_model: Any = model.backbone
            backbone_model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"}
            )
        return cls(
            order=tuple(g.name for g in backbone),
            modules={g.name: group_modules(model, g.parameters) for g in backbone},
            checkpointing=checkpointing,
            prefix_dropout=prefix_dropout,
        )

    def apply(self, trainable: frozenset[str]) -> None:
        """Set the modes of a phase in which the layer groups `trainable` train."""
        self._prefix = frozen_prefix(self.order, trainable)
        if self.checkpointing == "none":
            return
        below = False
        for name in self.order:
            recompute = below or (
                self.checkpointing == "non_reentrant" and name not in self._prefix
            )
            for module in self.modules[name]:
                for layer in module.modules():
                    if hasattr(layer, "gradient_checkpointing"):
                        vars(layer)["gradient_checkpointing"] = recompute
            below = below or name in trainable

    def enter_train(self) -> None:
        """Switch the frozen prefix's dropout off again after ``module.train()``."""
        if self.prefix_dropout:
            return
        for name in self._prefix:
            for module in self.modules[name]:
                module.eval()


def group_modules(model: nn.Module, parameters: Sequence[str]) -> list[nn.Module]:
    """Return the largest modules all of whose parameters are among `parameters`."""
    names = set(parameters)
    found: list[nn.Module] = []

    def visit(module: nn.Module, prefix: str) -> None:
        own = [n for n, _ in module.named_parameters(prefix=prefix)]
        if own and names.issuperset(own):
            found.append(module)
            return
        for child_name, child in module.named_children():
            visit(child, f"{prefix}.{child_name}" if prefix else child_name)

    visit(model, "")
    return found
