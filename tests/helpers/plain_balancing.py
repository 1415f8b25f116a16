"""Joint training of two tasks with balanced losses in plain torch: the answer of the papers.

Nothing of dist_ft's balancers is called: what is learnt are torch parameters with torch's Adam, and
gradients come from autograd.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from tests.helpers.tiny import TASKS, TinyModel, learning_rates

# What the topmost shared block is called in the tiny model.
SHARED = ("blocks.3.inner.weight", "blocks.3.outer.weight")


class Plain:
    """Weights of two tasks, as each paper has them."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.learnt = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        if policy == "gradnorm":
            self.learnt.data.fill_(1.0)
        lr = {"uncertainty": 0.05, "gradnorm": 0.05, "famo": 0.1}.get(policy, 0.0)
        self.adam = torch.optim.Adam([self.learnt], lr=lr)
        self.past: list[Tensor] = []

    def weights(self) -> Tensor:
        """What the losses weigh in the next step."""
        if self.policy == "uncertainty":
            return (-self.learnt).exp().detach()
        if self.policy == "gradnorm":
            return self.learnt.detach().clone()
        if self.policy == "dwa":
            return self._dwa()
        if self.policy == "equal" or not self.past:
            return torch.ones(2, dtype=torch.float64)
        parts = self.learnt.detach().softmax(0) / self.past[-1]
        return 2 * parts / parts.sum()

    def _dwa(self) -> Tensor:
        every, temperature = 4, 0.5
        blocks = [
            torch.stack(self.past[i : i + every]).mean(0)
            for i in range(0, len(self.past) - every + 1, every)
        ]
        if len(blocks) < 2:
            return torch.ones(2, dtype=torch.float64)
        return 2 * (blocks[-1] / blocks[-2] / temperature).softmax(0)

    def learn(self, losses: Tensor, norms: Tensor) -> None:
        """Take a step of what is learnt."""
        self.past.append(losses)
        if self.policy == "uncertainty":
            self._step(((-self.learnt).exp() * losses + self.learnt / 2).sum())
        elif self.policy == "gradnorm":
            sizes = self.learnt * norms
            rates = losses / self.past[0]
            wanted = sizes.mean() * (rates / rates.mean()) ** 1.5
            self._step((sizes - wanted.detach()).abs().sum())
            self.learnt.data *= 2 / self.learnt.data.sum()
        elif self.policy == "famo" and len(self.past) > 1:
            falls = self.past[-2].log() - losses.log()
            # The surrogate whose gradient is the softmax's Jacobian times the falls.
            self._step(
                (self.learnt.softmax(0) * falls).sum() + 0.01 / 2 * self.learnt.square().sum()
            )

    def _step(self, loss: Any) -> None:
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()


def train_plain(
    policy: str,
    groups: Any,
    schedule: Mapping[int, Any],
    *,
    steps: int,
    turns: Any,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], list[list[float]]]:
    """Return the weights of the model, and those of the losses by step.

    The model computes in `dtype`; the optimizer updates fp32 values.
    """
    model, plain = TinyModel(), Plain(policy)
    values = {n: p.detach().to(dtype).float().requires_grad_() for n, p in model.named_parameters()}
    optimizers = {
        g.name: torch.optim.AdamW([values[n] for n in g.parameters], weight_decay=g.weight_decay)
        for g in groups
    }
    trains: Any = ()
    history: list[list[float]] = []
    for step in range(steps):
        trains = schedule.get(step, trains)
        weights = plain.weights()
        history.append(weights.tolist())
        working = {n: v.to(dtype) for n, v in values.items()}
        losses = []
        for task in TASKS:
            batches = turns(step, task)
            terms = sum(len(b.targets["y"]) for b in batches)
            parts = [functional_call(model, working, (task, b.inputs, b.targets)) for b in batches]
            losses.append(sum(part[0] for part in parts) / terms)
        shared = [values[n] for n in SHARED]
        norms = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(x, shared, retain_graph=True)])
                .double()
                .norm()
                for x in losses
            ]
        )
        weighed = [float(w) * x for w, x in zip(weights, losses, strict=True)]
        total = torch.stack(weighed).mean()
        for value in values.values():
            value.grad = None
        total.backward()
        rates = learning_rates(groups, step)
        for group in groups:
            if group.layer_group in trains:
                optimizers[group.name].param_groups[0]["lr"] = rates[group.layer_group]
                optimizers[group.name].step()
        plain.learn(torch.stack([x.detach().double() for x in losses]), norms)
    return {n: v.detach() for n, v in values.items()}, history
