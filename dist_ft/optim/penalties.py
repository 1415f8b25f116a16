"""Penalties on weights, added to the gradient where the optimizer owns the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Penalty:
    """Penalties on one parameter group.

    The loss gets ``l1 * |w| + l2 / 2 * |w|^2 + l2_start / 2 * |w - start|^2``, summed over the
    group's elements. Adam divides their gradient like the loss's (it is coupled), unlike weight
    decay's. Clipping sees the loss's gradient alone.

    Attributes:
        l1: Pull of constant strength to zero (lasso, Tibshirani 1996).
        l2: Pull to zero in proportion to the weight (ridge).
        l2_start: Pull to the weight that the run started from (L2-SP, Li, Grandvalet and
            Davoine 2018, section 3).
    """

    l1: float = 0.0
    l2: float = 0.0
    l2_start: float = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to add."""
        return not (self.l1 or self.l2 or self.l2_start)


@dataclass(frozen=True)
class PenaltyRules:
    """Which penalties the parameter groups of a model get.

    Weights that are not pre-trained have nothing to return to: L2-SP pulls them to zero, as the
    paper's second term does. Pulls to zero leave vectors and scalars (biases, normalisation) out,
    as weight decay does; the pull to the start includes them.

    Attributes:
        l1: Of every group.
        l2: Of every group.
        l2_sp: Strength of L2-SP on what is pre-trained (the paper's alpha).
        l2_sp_new: Strength of L2-SP on heads and other new weights (the paper's beta).
        mixout: Mixout's probability on pre-trained matrices of blocks (Lee et al. 2020).
        new: Layer groups beside the heads that do not start from pre-trained weights.
        known_heads: Heads that do: a language model's comes with its checkpoint.
    """

    l1: float = 0.0
    l2: float = 0.0
    l2_sp: float = 0.0
    l2_sp_new: float = 0.0
    mixout: float = 0.0
    new: frozenset[str] = field(default_factory=frozenset)
    known_heads: frozenset[str] = field(default_factory=frozenset)

    def of(self, layer_group: str, *, is_head: bool, decays: bool) -> Penalty:
        """Return the penalty of a parameter group.

        Args:
            layer_group: Its layer group.
            is_head: Whether that is a head.
            decays: Whether its parameters are matrices.
        """
        is_new = (is_head and layer_group not in self.known_heads) or layer_group in self.new
        return Penalty(
            l1=self.l1 if decays else 0.0,
            l2=(self.l2 + (self.l2_sp_new if is_new else 0.0)) if decays else 0.0,
            l2_start=0.0 if is_new else self.l2_sp,
        )

    def mixout_of(self, layer_group: str, *, kind: str, decays: bool) -> float:
        """Return mixout's probability of a parameter group.

        As in the authors' code, the matrices of linear layers are mixed: biases, normalisation and
        embeddings are not, and new weights have no start worth going back to.

        Args:
            layer_group: Its layer group.
            kind: That group's kind.
            decays: Whether its parameters are matrices.
        """
        is_other = kind in ("head", "embeddings", "unused") or layer_group in self.new
        return self.mixout if decays and not is_other else 0.0


@torch.no_grad()
def add_penalty(
    parameters: Sequence[Tensor], penalty: Penalty, *, anchors: Sequence[Tensor]
) -> None:
    """Add a penalty's gradient to that of each parameter; one without a gradient is left alone.

    Args:
        parameters: What the optimizer updates, each with its gradient.
        penalty: What to add.
        anchors: The start of each parameter, as many elements; empty where nothing pulls there.

    Raises:
        RuntimeError: If the penalty needs a start and there is not one for each parameter.
    """
    if penalty.l2_start and len(anchors) != len(parameters):
        raise RuntimeError(
            f"the optimizer updates {len(parameters)} tensors and L2-SP has the start of "
            f"{len(anchors)}: this DeepSpeed version lays its groups out otherwise; install the "
            "version of constraints.txt"
        )
    for index, parameter in enumerate(parameters):
        gradient = parameter.grad
        if gradient is None:
            continue
        if penalty.l1:
            gradient.add_(parameter.sign(), alpha=penalty.l1)
        if penalty.l2:
            gradient.add_(parameter, alpha=penalty.l2)
        if penalty.l2_start:
            start = anchors[index].to(parameter.device, parameter.dtype).view_as(parameter)
            gradient.add_(parameter - start, alpha=penalty.l2_start)
