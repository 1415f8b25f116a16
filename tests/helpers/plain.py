"""Regularised training of the tiny model in plain torch: the answer that the engines must give.

Nothing of dist_ft's optimizers, penalties, mixout or averages is called: only the tiny model's own
forward, autograd and torch's AdamW.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from dist_ft.optim.param_groups import ParamGroup
from tests.helpers.tiny import TASKS, TinyModel, global_batch, learning_rates

# Of the tiny model: what mixout and L2-SP leave out.
NEW = ("heads.", "blocks.2.")


@dataclass
class PlainRules:
    """What is added to a plain run; all off by default."""

    l1: float = 0.0
    l2: float = 0.0
    l2_sp: float = 0.0
    l2_sp_new: float = 0.0
    mixout: float = 0.0
    ema: float | None = None
    swa: tuple[int, int] | None = None
    clip: float = 0.0
    dtype: torch.dtype = torch.float32
    seed: int = 0


@dataclass
class PlainRun:
    """Trains the tiny model; `averages` are of the groups that trained."""

    groups: list[ParamGroup]
    rules: PlainRules
    weights: dict[str, Tensor] = field(default_factory=dict)
    averages: dict[str, Tensor] = field(default_factory=dict)

    def train(self, schedule: Mapping[int, Any], *, steps: int) -> PlainRun:
        rules, model = self.rules, TinyModel()
        # fp32 values that the optimizer updates, begun from weights in the run's precision.
        values = {
            n: p.detach().to(rules.dtype).float().requires_grad_()
            for n, p in model.named_parameters()
        }
        start = {n: v.detach().clone() for n, v in values.items()}
        optimizers = {
            g.name: torch.optim.AdamW(
                [values[n] for n in g.parameters], weight_decay=g.weight_decay
            )
            for g in self.groups
        }
        counts: dict[str, int] = {}
        trains: Any = ()
        for step in range(steps):
            trains = schedule.get(step, trains)
            task = TASKS[step % len(TASKS)]
            active = [g for g in self.groups if g.layer_group in trains and task in g.tasks]
            names = [n for g in active for n in g.parameters]
            working = {n: v.to(rules.dtype) for n, v in values.items()}
            for name in names:
                if rules.mixout and working[name].dim() > 1 and _is_pretrained_matrix(name):
                    working[name] = self._mixed(name, working[name], start[name], step=step)
            batches = global_batch(step, micro_batches=4)
            terms = sum(len(b.targets["y"]) for b in batches)
            losses = [
                functional_call(model, working, (task, b.inputs, b.targets))[0] for b in batches
            ]
            loss = torch.stack(losses).sum() / terms
            gradients = list(torch.autograd.grad(loss, [values[n] for n in names]))
            if rules.clip:
                norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
                factor = min(1.0, rules.clip / (float(norm) + 1e-6))
                gradients = [g * factor for g in gradients]
            for name, gradient in zip(names, gradients, strict=True):
                values[name].grad = gradient + self._pull(name, values[name], start[name])
            rates = learning_rates(self.groups, step)
            for group in active:
                optimizers[group.name].param_groups[0]["lr"] = rates[group.layer_group]
                optimizers[group.name].step()
            trained = [n for g in self.groups if g.layer_group in trains for n in g.parameters]
            self._average(step + 1, {n: values[n].detach() for n in trained}, counts)
        self.weights = {n: v.detach().to(rules.dtype) for n, v in values.items()}
        return self

    def _mixed(self, name: str, weight: Tensor, start: Tensor, *, step: int) -> Tensor:
        p = self.rules.mixout
        drawn = torch.from_numpy(mask(self.rules.seed, step, name, weight.numel(), p))
        m = drawn.view_as(weight).float()
        # Lee et al. 2020, as it stands there.
        mixed = (m * start + (1 - m) * weight.float() - p * start) / (1 - p)
        return mixed.to(weight.dtype)

    def _pull(self, name: str, value: Tensor, start: Tensor) -> Tensor:
        """The gradient of the penalties, by autograd."""
        rules, is_new = self.rules, name.startswith(NEW)
        leaf = value.detach().clone().requires_grad_()
        loss = leaf.sum() * 0.0
        if not is_new:
            loss = loss + rules.l2_sp / 2 * (leaf - start).square().sum()
        if leaf.dim() > 1:
            loss = loss + rules.l1 * leaf.abs().sum()
            pull = rules.l2 + (rules.l2_sp_new if is_new else 0.0)
            loss = loss + pull / 2 * leaf.square().sum()
        return torch.autograd.grad(loss, leaf)[0]

    def _average(self, done: int, values: dict[str, Tensor], counts: dict[str, int]) -> None:
        if self.rules.swa is not None:
            begin, every = self.rules.swa
            if done <= begin or (done - begin) % every:
                return
        elif self.rules.ema is None:
            return
        for name, value in values.items():
            n = counts.get(name, 0)
            counts[name] = n + 1
            if n == 0:
                self.averages[name] = value.clone()
            elif self.rules.ema is not None:
                decay = self.rules.ema
                self.averages[name] = decay * self.averages[name] + (1 - decay) * value
            else:
                self.averages[name] = (n * self.averages[name] + value) / (n + 1)


def _is_pretrained_matrix(name: str) -> bool:
    return name.startswith("blocks.") and not name.startswith(NEW)


def mask(seed: int, step: int, name: str, numel: int, probability: float) -> Any:
    """Mixout's draws in numpy's 32-bit arithmetic: True where the start takes the place."""
    key = int.from_bytes(
        hashlib.blake2b(f"mixout {seed} {step} {name}".encode(), digest_size=8).digest(), "big"
    )
    x = np.arange(numel, dtype=np.uint32) ^ np.uint32(key & 0xFFFFFFFF)
    x = _lowbias32(x)
    x = _lowbias32(x ^ np.uint32(key >> 32))
    return x < np.uint64(round(probability * 2**32))


def _lowbias32(x: Any) -> Any:
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
