"""Training losses of a tiny BERT written out in plain torch: the answer that ours must give.

Nothing of dist_ft's objectives is called and no hook is used: changed embeddings go in through
transformers' own ``inputs_embeds``, and mixed hidden states by running the blocks one by one.
Dropout and draws come from torch's generator, so forwards and draws stand in one order. Logits and
draws are fp32 whatever the model is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PlainObjective:
    """What is added to the cross-entropy; all off by default."""

    smoothing: float = 0.0
    r_drop: float = 0.0
    neftune: float = 0.0
    cutoff: tuple[float, float, float] | None = None
    smart: tuple[float, int, float, float, float] | None = None
    freelb: tuple[int, float, float, float] | None = None
    mixup: tuple[float, tuple[int, ...]] | None = None
    penalty: float = 0.0  # a program's own: so much of the logits' squares

    def loss(self, model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Return the summed loss."""
        mask = inputs["attention_mask"].bool()
        mixing = None if self.mixup is None else self._mixing(mask)

        def run(*changes: Change) -> Tensor:
            noise = [self._noise(mask)] if self.neftune else []
            return _logits(model, inputs, [*noise, *changes], mixing)

        def entropy(logits: Tensor) -> Tensor:
            def of(target: Tensor) -> Tensor:
                return functional.cross_entropy(
                    logits, target, label_smoothing=self.smoothing, reduction="sum"
                )

            if mixing is None:
                return of(labels) + self.penalty * logits.square().sum()
            _, partner, share, _ = mixing
            return share * of(labels) + (1 - share) * of(labels[partner])

        def without_words(clean: Tensor) -> Tensor:
            if self.cutoff is None:
                return torch.zeros(())
            share, weight, consistency = self.cutoff
            keep = _cut(mask, share)[..., None]
            other = run(lambda e: e * keep.to(e.dtype))
            return weight * entropy(other) + consistency * _js(clean, other)

        if self.freelb is not None:
            return self._freelb(run, entropy, mask, without_words)
        first = run()
        loss = entropy(first)
        if self.r_drop:
            second = run()
            loss = (loss + entropy(second)) / 2 + self.r_drop * _symmetric(first, second)
        loss = loss + without_words(first)
        if self.smart is not None:
            loss = loss + self._smart(run, first)
        return loss

    def _noise(self, mask: Tensor) -> Change:
        def change(e: Tensor) -> Tensor:
            noise = torch.empty(e.shape).uniform_(-1, 1)
            size = self.neftune / (mask.sum(1) * e.shape[-1]).sqrt()
            return e + (noise * size[:, None, None]).to(e.dtype)

        return change

    def _mixing(self, mask: Tensor) -> Any:
        assert self.mixup is not None
        alpha, blocks = self.mixup
        block = blocks[int(torch.randint(len(blocks), ()))]
        share = float(torch.distributions.Beta(alpha, alpha).sample())
        partner = torch.randperm(len(mask))
        return block, partner, max(share, 1 - share), mask & mask[partner]

    def _smart(self, run: Any, clean: Tensor) -> Tensor:
        assert self.smart is not None
        weight, steps, size, radius, noise = self.smart
        delta: Tensor | None = None

        def change(e: Tensor) -> Tensor:
            nonlocal delta
            if delta is None:
                delta = (torch.randn(e.shape) * noise).clamp(-radius, radius)
                delta.requires_grad_()
            return e + delta.to(e.dtype)

        for _ in range(steps):
            value = _symmetric(run(change), clean.detach())
            assert delta is not None
            (g,) = torch.autograd.grad(value, delta)
            direction = g / g.abs().max(-1, keepdim=True).values.clamp(min=1e-12)
            delta = (delta.detach() + size * direction).clamp(-radius, radius).requires_grad_()
        assert delta is not None
        delta = delta.detach()
        p, q = run(change).softmax(-1), clean.softmax(-1)
        return weight * (_kl(p, q) + _kl(q, p))

    def _freelb(self, run: Any, entropy: Any, mask: Tensor, without_words: Any) -> Tensor:
        assert self.freelb is not None
        steps, size, radius, init = self.freelb
        delta: Tensor | None = None

        def change(e: Tensor) -> Tensor:
            nonlocal delta
            if delta is None:
                scale = init / (mask.sum(1) * e.shape[-1]).sqrt()
                start = torch.empty(e.shape).uniform_(-1, 1) * scale[:, None, None]
                delta = (start * mask[..., None]).requires_grad_()
            return e + delta.to(e.dtype)

        losses, cut = [], torch.zeros(())
        for step in range(steps):
            logits = run(change)
            losses.append(entropy(logits))
            if step + 1 == steps:
                cut = without_words(logits)
            assert delta is not None
            (g,) = torch.autograd.grad(losses[-1], delta, retain_graph=True)
            moved = delta.detach() + size * g / g.norm(dim=(1, 2), keepdim=True)
            norms = moved.norm(dim=(1, 2), keepdim=True)
            delta = (moved * (radius / norms).clamp(max=1)).requires_grad_()
        return sum(losses[1:], losses[0]) / steps + cut


def _logits(model: Any, inputs: dict[str, Tensor], changes: Sequence[Change], mixing: Any) -> Any:
    backbone, head = model.backbone, model.heads["a"]
    e = backbone.embeddings.word_embeddings.weight[inputs["input_ids"]]
    for change in changes:
        e = change(e)
    mask = inputs["attention_mask"]
    if mixing is None:
        return model("a", {"inputs_embeds": e, "attention_mask": mask})["logits"].float()
    block, partner, share, both = mixing
    h = backbone.embeddings(inputs_embeds=e)
    blocked = torch.zeros(mask.shape, dtype=h.dtype).masked_fill(
        ~mask.bool(), torch.finfo(h.dtype).min
    )
    for index, layer in enumerate(backbone.encoder.layer):
        out = layer(h, blocked[:, None, None, :])
        h = out[0] if isinstance(out, tuple) else out
        if index == block:
            h = torch.where(both[..., None], share * h + (1 - share) * h[partner], h)
    return head.classifier(head.dropout(backbone.pooler(h))).float()


def _cut(mask: Tensor, share: float) -> Tensor:
    """1 for the positions that keep their word."""
    scores = torch.rand(mask.shape).masked_fill(~mask, 2.0)
    keep = torch.ones(mask.shape)
    for row, length in enumerate(mask.sum(1).tolist()):
        for place in scores[row].argsort()[: int(share * length + 1e-6)].tolist():
            keep[row, place] = 0.0
    return keep


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of probabilities, summed over rows."""
    return (p * (p.log() - q.log())).sum()


def _symmetric(one: Tensor, other: Tensor) -> Tensor:
    p, q = one.softmax(-1), other.softmax(-1)
    return (_kl(p, q) + _kl(q, p)) / 2


def _js(one: Tensor, other: Tensor) -> Tensor:
    p, q = one.softmax(-1), other.softmax(-1)
    m = (p + q) / 2
    return (_kl(p, m) + _kl(q, m)) / 2
