"""Small changes of the word embeddings that a model is trained to withstand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_ft.model.word_embeddings import WordEmbeddings

Forward = Callable[[], Any]
Scalar = Callable[[Any], Tensor]
_TINY = 1e-12


@dataclass(frozen=True)
class Smart:
    """Smoothness-inducing adversarial regularisation, SMART (Jiang et al. 2020, section 3.1).

    The output may change little where the embeddings change little: the term is the largest
    divergence that `steps` steps of projected gradient ascent find in a ball around them.

    Attributes:
        weight: Of the term (the paper's lambda).
        steps: Steps of ascent.
        step_size: Of a step along the gradient, divided by its largest element in each token.
        radius: Of the ball, in the largest element (the paper's epsilon).
        noise: Standard deviation of the start, as the gradient in the middle is zero.
    """

    weight: float
    steps: int = 1
    step_size: float = 1e-3
    radius: float = 1e-5
    noise: float = 1e-5

    def term(self, run: Forward, words: WordEmbeddings, *, away: Scalar, held: Scalar) -> Tensor:
        """Return the weighted divergence at the change that was found.

        Args:
            run: Runs the model.
            words: Its word embeddings.
            away: Divergence of outputs from the unchanged ones, through which nothing is trained.
            held: The same divergence as a term of the loss.
        """
        change = Change(self._start)
        for _ in range(self.steps):
            with words.changed(change):
                value = away(run())
            (gradient,) = torch.autograd.grad(value, change.delta)
            largest = gradient.abs().amax(-1, keepdim=True)
            moved = change.delta.detach() + self.step_size * gradient / largest.clamp(min=_TINY)
            change.delta = moved.clamp(-self.radius, self.radius).requires_grad_()
        change.delta = change.delta.detach()
        with words.changed(change):
            return self.weight * held(run())

    def _start(self, like: Tensor) -> Tensor:
        return (torch.randn_like(like) * self.noise).clamp(-self.radius, self.radius)


@dataclass(frozen=True)
class FreeLB:
    """Training on adversarial embeddings, FreeLB (Zhu et al. 2020, algorithm 1).

    A micro-batch goes through the model `steps` times, each time with a change of the embeddings
    that has gone one step further up the loss; the gradients are averaged. The backward pass that
    the weights need gives the change's gradient as well. Dropout draws anew in each pass.

    Attributes:
        steps: Passes (the paper's K).
        step_size: L2 length of a step, over all of a row (the paper's alpha).
        radius: Largest L2 norm of a row's change (the paper's epsilon).
        init: The start is uniform, of L2 norm at most this.
    """

    steps: int = 2
    step_size: float = 0.1
    radius: float = 0.6
    init: float = 0.05

    def start(self, tokens: Tensor) -> Change:
        """Return the change of a micro-batch's first pass.

        Args:
            tokens: Which positions are no padding, bool [rows, length].
        """
        return Change(lambda like: self._start(like, tokens))

    def ascend(self, change: Change) -> None:
        """Move a change along the gradient that the backward of its pass has left there."""
        gradient = change.delta.grad
        assert gradient is not None
        length = gradient.flatten(1).norm(dim=1)[:, None, None]
        # Divided by its length, the gradient may have any scale: the engine's, or fp16's. Where it
        # is too large for fp16 the row stays: a NaN would hide that the scale was to blame.
        direction = torch.where(length.isfinite(), gradient / length.clamp(min=_TINY), 0.0)
        moved = change.delta.detach() + self.step_size * direction
        size = moved.flatten(1).norm(dim=1)[:, None, None]
        moved = moved * (self.radius / size.clamp(min=_TINY)).clamp(max=1.0)
        change.delta = moved.requires_grad_()

    def _start(self, like: Tensor, tokens: Tensor) -> Tensor:
        size = self.init / (tokens.sum(1) * like.shape[-1]).sqrt()
        start = torch.empty_like(like).uniform_(-1, 1) * size[:, None, None]
        return start * tokens[..., None]


class Change:
    """Adds `delta` to the embeddings; the first time it is made from their shape, in fp32."""

    def __init__(self, start: Callable[[Tensor], Tensor]) -> None:
        """Begin with what `start` makes of the embeddings' shape."""
        self._start = start
        self._delta: Tensor | None = None

    @property
    def delta(self) -> Tensor:
        """What is added, fp32 [rows, length, width]."""
        assert self._delta is not None
        return self._delta

    @delta.setter
    def delta(self, value: Tensor) -> None:
        self._delta = value

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Return the changed embeddings."""
        if self._delta is None:
            like = torch.empty(embeddings.shape, dtype=torch.float32, device=embeddings.device)
            self._delta = self._start(like).requires_grad_()
        return embeddings + self._delta.to(embeddings.dtype)
