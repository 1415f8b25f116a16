"""The loss that a task trains on: forwards of several kinds, put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_ft.engine.adversary import Change, FreeLB, Smart
from dist_ft.model.hidden_mixup import HiddenMixup, Mixture
from dist_ft.model.word_embeddings import WordEmbeddings, tokens_of
from dist_ft.tasks.output_regularization import OutputRegularizer

Targets = Mapping[str, Tensor]


@dataclass(frozen=True)
class Cutoff:
    """Token cutoff with consistency (Shen et al. 2020, section 3).

    The word embeddings of some of a row's tokens become zero in a second forward. The loss gets
    that forward's own and the Jensen-Shannon divergence of the two. (The paper removes the
    position's embedding as well; here only the word is gone.)

    Attributes:
        share: Of a row's tokens, rounded down.
        weight: Of the second forward's loss (the paper's alpha).
        consistency: Weight of the divergence (the paper's beta).
    """

    share: float
    weight: float = 1.0
    consistency: float = 1.0

    def kept(self, tokens: Tensor) -> Tensor:
        """Return which positions keep their words, drawn anew: bool [rows, length]."""
        scores = torch.rand(tokens.shape, device=tokens.device).masked_fill(~tokens, 2.0)
        place = scores.argsort(dim=1).argsort(dim=1)
        # Floats such as 0.3 * 10 may lie just below the whole number that they mean.
        count = (tokens.sum(1) * self.share + 1e-6).long()
        return place >= count[:, None]


@dataclass
class PassMemory:
    """What a micro-batch's passes leave for the next one.

    Attributes:
        done: Passes done.
        mixture: How rows are mixed.
        change: FreeLB's change of the embeddings.
    """

    done: int = 0
    mixture: Mixture | None = None
    change: Change | None = None


@dataclass(frozen=True)
class Objective:
    """What a task's loss is made of while it trains.

    Attributes:
        outputs: The loss of a forward, and divergences of two.
        r_drop: Weight of the consistency of two forwards with other dropout (R-Drop, Liang et al.
            2021): the loss is the mean of both plus the weight times half their symmetric
            Kullback-Leibler divergence, as in the authors' code.
        words: The model's word embeddings, where something changes them.
        cutoff: Token cutoff.
        adversary: Adversarial changes of the embeddings.
        mixup: Of hidden states; every forward of a micro-batch mixes the same rows.
    """

    outputs: OutputRegularizer
    r_drop: float = 0.0
    words: WordEmbeddings | None = None
    cutoff: Cutoff | None = None
    adversary: Smart | FreeLB | None = None
    mixup: HiddenMixup | None = None

    @property
    def passes(self) -> int:
        """How often a micro-batch goes forward and backward."""
        return self.adversary.steps if isinstance(self.adversary, FreeLB) else 1

    def __call__(
        self,
        run: Callable[[], Any],
        inputs: Mapping[str, Tensor],
        targets: Targets,
        *,
        memory: PassMemory,
    ) -> Tensor:
        """Return the summed loss of a pass, float32 scalar; a micro-batch's is that of all passes.

        Args:
            run: Runs the model on `inputs`; dropout draws anew each time.
            inputs: Of the micro-batch.
            targets: Of the micro-batch.
            memory: What the passes before have left.
        """
        if memory.done == 0 and self.mixup is not None:
            memory.mixture = self.mixup.draw(inputs)
        with ExitStack() as stack:
            if self.mixup is not None:
                assert memory.mixture is not None
                stack.enter_context(self.mixup.mixed(memory.mixture))

            def plain(outputs: Any) -> Tensor:
                return self._plain(outputs, targets, mixture=memory.mixture)

            if isinstance(self.adversary, FreeLB):
                clean = self._changed(run, inputs, memory=memory)
                loss = plain(clean) / self.adversary.steps
            else:
                loss, clean = self._clean(run, targets, plain=plain)
            # In the last pass: FreeLB's change goes up the task's own loss alone.
            if self.cutoff is not None and memory.done + 1 == self.passes:
                loss = loss + self._cut(run, clean, inputs, targets, plain=plain)
            if isinstance(self.adversary, Smart):
                loss = loss + self._smooth(run, clean, targets)
        memory.done += 1
        return loss

    def _plain(self, outputs: Any, targets: Targets, *, mixture: Mixture | None) -> Tensor:
        own = self.outputs(outputs, targets)
        if mixture is None:
            return own
        others = {name: value[mixture.partner] for name, value in targets.items()}
        other = self.outputs(outputs, others)
        return mixture.share * own + (1.0 - mixture.share) * other

    def _clean(
        self, run: Callable[[], Any], targets: Targets, *, plain: Callable[[Any], Tensor]
    ) -> tuple[Tensor, Any]:
        first = run()
        loss = plain(first)
        if self.r_drop:
            second = run()
            loss = torch.stack([loss, plain(second)]).mean()
            loss = loss + self.r_drop * self.outputs.divergence(first, second, targets)
        return loss, first

    def _changed(
        self, run: Callable[[], Any], inputs: Mapping[str, Tensor], *, memory: PassMemory
    ) -> Any:
        assert isinstance(self.adversary, FreeLB)
        assert self.words is not None
        if memory.change is None:
            memory.change = self.adversary.start(tokens_of(inputs))
        else:
            self.adversary.ascend(memory.change)
        with self.words.changed(memory.change):
            return run()

    def _cut(
        self,
        run: Callable[[], Any],
        clean: Any,
        inputs: Mapping[str, Tensor],
        targets: Targets,
        *,
        plain: Callable[[Any], Tensor],
    ) -> Tensor:
        assert self.cutoff is not None
        assert self.words is not None
        kept = self.cutoff.kept(tokens_of(inputs))
        with self.words.changed(lambda words: words * kept[..., None]):
            cut = run()
        divergence = self.outputs.jensen_shannon(clean, cut, targets)
        return self.cutoff.weight * plain(cut) + self.cutoff.consistency * divergence

    def _smooth(self, run: Callable[[], Any], clean: Any, targets: Targets) -> Tensor:
        assert isinstance(self.adversary, Smart)
        assert self.words is not None
        fixed = _detached(clean)
        # The paper's term is the divergence one way plus the other, ours the mean of both.
        return self.adversary.term(
            run,
            self.words,
            away=lambda outputs: self.outputs.divergence(outputs, fixed, targets),
            held=lambda outputs: 2 * self.outputs.divergence(outputs, clean, targets),
        )


def _detached(outputs: Any) -> dict[str, Any]:
    return {k: v.detach() if isinstance(v, Tensor) else v for k, v in outputs.items()}
