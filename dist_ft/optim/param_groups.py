"""Optimizer parameter groups: one or two for each layer group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dist_ft.model.layer_groups import LayerGroup
from dist_ft.optim.penalties import Penalty, PenaltyRules


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that freeze, step, decay and learn together.

    A parameter group never spans layer groups, so the flat ZeRO partition of its parameters is
    the same in every phase and its optimizer state can move from phase to phase unchanged.

    Attributes:
        name: Layer group and decay class, like ``block.3/decay``.
        layer_group: The layer group that it belongs to.
        parameters: Names as in ``named_parameters()`` of the model.
        weight_decay: Decoupled weight decay per step and unit of learning rate.
        lr: Peak learning rate.
        tasks: Tasks whose loss reaches the parameters.
        penalty: What is added to the loss for them.
        held_rows: Rows that never move, by parameter: first row and end of each range.
        mixout: Chance of an element to be what it was at the start, for a step.
    """

    name: str
    layer_group: str
    parameters: tuple[str, ...]
    weight_decay: float
    lr: float
    tasks: frozenset[str]
    penalty: Penalty = field(default_factory=Penalty)
    held_rows: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    mixout: float = 0.0

    @property
    def needs_start(self) -> bool:
        """Whether the weights that the run started from are kept, for L2-SP or mixout."""
        return bool(self.penalty.l2_start or self.mixout)

    def is_active(self, tasks: frozenset[str], *, trainable: frozenset[str]) -> bool:
        """Return whether a step of these tasks updates the group while `trainable` trains."""
        return self.layer_group in trainable and not tasks.isdisjoint(self.tasks)


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rates by depth.

    Attributes:
        lr: Of the backbone's top group.
        head_lr: Of the heads; `lr` when None.
        layer_decay: Factor from a group to the next one below it (layer-wise learning-rate decay,
            ELECTRA, Clark et al. 2020; discriminative fine-tuning, ULMFiT section 3.2).
    """

    lr: float
    head_lr: float | None = None
    layer_decay: float = 1.0


def build_param_groups(
    layer_groups: Sequence[LayerGroup],
    *,
    dimensions: Mapping[str, int],
    rates: LearningRates,
    weight_decay: float,
    penalties: PenaltyRules | None = None,
) -> list[ParamGroup]:
    """Return the parameter groups, bottom to top.

    Vectors and scalars (biases, normalisation weights) are not decayed, as usual since BERT.

    Args:
        layer_groups: From the bottom to the top.
        dimensions: Number of dimensions of each parameter, by name.
        rates: Peak learning rates.
        weight_decay: For matrices and embeddings.
        penalties: Which penalties the groups get; none without.
    """
    rules = penalties or PenaltyRules()
    backbone = [group.name for group in layer_groups if group.kind not in ("head", "unused")]
    below_top = {name: len(backbone) - 1 - i for i, name in enumerate(backbone)}
    result: list[ParamGroup] = []
    for group in layer_groups:
        if group.kind == "head":
            lr = rates.lr if rates.head_lr is None else rates.head_lr
        else:
            lr = rates.lr * rates.layer_decay ** below_top.get(group.name, 0)
        for suffix, decay in (("decay", weight_decay), ("no_decay", 0.0)):
            names = tuple(n for n in group.trained if (dimensions[n] > 1) == (suffix == "decay"))
            if names:
                decays, name = suffix == "decay", f"{group.name}/{suffix}"
                penalty = rules.of(group.name, is_head=group.kind == "head", decays=decays)
                mixout = rules.mixout_of(group.name, kind=group.kind, decays=decays)
                result.append(
                    ParamGroup(
                        name, group.name, names, decay, lr, group.tasks, penalty, mixout=mixout
                    )
                )
    return result


def hold_rows(
    groups: Sequence[ParamGroup], parameter: str, *, rows: Sequence[tuple[int, int]]
) -> list[ParamGroup]:
    """Return the groups with ranges of rows of a parameter held where they are."""
    return [
        replace(g, held_rows={parameter: tuple(rows)}) if parameter in g.parameters else g
        for g in groups
    ]
