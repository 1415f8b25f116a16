"""A regularizer of your own: a penalty on being too sure."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_ft import Choice, fine_tune


def confidence_penalty(choices: Sequence[Choice], weight: float = 0.1) -> Tensor:
    """Return minus the entropy of what the model says, summed (Pereyra et al. 2017)."""
    sums: list[Tensor] = []
    for choice in choices:  # one; two for the start and the end of an answer
        logs = choice.logits.float().log_softmax(-1)
        sums.append((logs.exp() * logs).sum())
    return weight * torch.stack(sums).mean()


run = fine_tune(
    "tickets.yaml", overrides=["name=less-sure"], regularizers={"kind": confidence_penalty}
)
