"""Modes of the layers that depend on the phase: dropout of the frozen prefix, recomputation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_ft.engine.trunk_passes import TrunkPasses
from dist_ft.freezing.schedule import frozen_prefix
from dist_ft.model.backbone import MultiTaskModel
from dist_ft.model.layer_groups import LayerGroup
from dist_ft.model.stacks import group_modules

Checkpointing = Literal["none", "reentrant", "non_reentrant"]


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
        passes: How micro-batches go through the blocks.
        blocks: The module of each group that is one whole transformer block.
    """

    order: tuple[str, ...] = ()
    modules: Mapping[str, Sequence[nn.Module]] = field(default_factory=dict)
    checkpointing: Checkpointing = "none"
    prefix_dropout: bool = True
    passes: TrunkPasses = field(default_factory=TrunkPasses)
    blocks: Mapping[str, nn.Module] = field(default_factory=dict)
    _prefix: list[str] = field(default_factory=list)
    _trains: nn.Module | None = None

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
        passes: TrunkPasses,
    ) -> LayerModes:
        """Return the modes of `model`, whose parameters `groups` name."""
        backbone = [g for g in groups if g.kind != "head"]
        if checkpointing != "none":
            # Gives every block that can recompute the function to do it with; `apply` says which.
            backbone_model: Any = model.backbone
            backbone_model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"}
            )
        modules = {g.name: group_modules(model, g.parameters) for g in backbone}
        whole = [g.name for g in backbone if g.kind == "block" and len(modules[g.name]) == 1]
        if backbone:
            # A dropout beside the embeddings, as GPT-2's, has no parameters to be named by.
            modules[backbone[0].name] += [
                m for m in model.backbone.children() if isinstance(m, nn.Dropout)
            ]
        return cls(
            order=tuple(g.name for g in backbone),
            modules=modules,
            checkpointing=checkpointing,
            prefix_dropout=prefix_dropout,
            passes=passes,
            blocks={name: modules[name][0] for name in whole},
        )

    def apply(self, trainable: frozenset[str], *, weight: Callable[[str], Tensor]) -> None:
        """Set the modes of a phase in which the layer groups `trainable` train.

        Args:
            trainable: The layer groups.
            weight: Returns a whole parameter by name; every rank calls it for the same ones.
        """
        self._trains = None
        self.passes.enter_phase(trainable, weight=weight)
        self._prefix = frozen_prefix(self.order, trainable)
        if (trunk := self.passes.trunk) is not None:
            below = self.order[: self.order.index(trunk.group_names[0])]
            frozen = bool(below) and set(below) <= set(self._prefix)
            trunk.still = frozen and not self.prefix_dropout
            # What is kept of a whole frozen trunk is every token's: computed so in any case.
            trunk.may_narrow = trunk.group_names[-1] not in self._prefix
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

    def enter_train(self, module: nn.Module) -> None:
        """Put `module` into train mode and the frozen prefix's dropout off, unless it is so.

        Batch normalisation keeps the statistics that it was pre-trained with: those of a rank's
        micro-batch differ from rank to rank, move in frozen layers too, and are no parameters, so
        that no checkpoint and no export would have them. Going through all modules takes longer
        than the step of a head.
        """
        if module is self._trains and module.training:
            return
        module.train()
        for part in module.modules():
            if isinstance(part, _BatchNorm) and part.track_running_stats:
                part.eval()
        self._trains = module
        if self.prefix_dropout:
            return
        for name in self._prefix:
            for part in self.modules[name]:
                part.eval()
