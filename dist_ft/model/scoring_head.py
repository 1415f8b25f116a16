"""A language model's head that computes the loss instead of its logits.

A task model's forward ends with its head, a linear layer, whose logits it returns. Inside
`ScoringHead.scoring` that layer returns the summed loss of given labels, as one number where the
logits would be, and the forward of the transformers class runs unchanged. The layer is called as
always: under ZeRO-3 its hooks gather the weights, tied or not, for forward and backward.

What a model does to its logits after the head (a cap, a scale) would be done to the loss, so `find`
compares with the plain forward, and refuses such a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_ft.kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy
from dist_ft.model.backbone import MultiTaskModel
from dist_ft.model.probe import dummy_inputs, undisturbed

# BART and its kin add a buffer of this name to their logits.
_BIAS = "final_logits_bias"
# Largest relative difference of two fp32 losses.
_SAME = 1e-5
# What a model may raise that finds one number where its logits should be.
_ERRORS = (ValueError, RuntimeError, TypeError, AttributeError, LookupError)


@dataclass(frozen=True)
class ScoringHead:
    """The head of one task's model.

    Attributes:
        owner: the task's transformers model.
        head: its head.
    """

    owner: nn.Module
    head: nn.Linear

    @classmethod
    def find(cls, model: MultiTaskModel, task: str) -> ScoringHead:
        """Return the head of `task`, having compared its loss with that of the logits.

        The model must be in full precision and not yet partitioned; it is left as it was.

        Raises:
            ValueError: the model can't be scored so; the message says why, without its name.
        """
        owner: Any = model.heads[task]
        head = owner.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise ValueError(f"its head is a {type(head).__name__}, not a linear layer")
        found = cls(owner, head)
        with undisturbed(model), torch.no_grad():
            with model.task_model(task) as task_model:
                inputs = dummy_inputs(task_model)
            plain = model(task, inputs)["logits"].float()
            places = torch.arange(plain.shape[:-1].numel(), device=plain.device)
            labels = (7 * places % plain.shape[-1]).view(plain.shape[:-1])
            labels[:, 0] = IGNORE_INDEX
            expected = nn.functional.cross_entropy(
                plain.flatten(0, -2), labels.flatten(), reduction="sum"
            )
            try:
                with found.scoring(labels):
                    loss = model(task, inputs)["logits"]
            except _ERRORS as error:
                raise ValueError("it does something else with its logits") from error
        if loss.numel() != 1 or not float((loss - expected).abs()) <= _SAME * float(expected):
            raise ValueError("it changes its logits after the head")
        return found

    @contextmanager
    def scoring(self, labels: Tensor, *, label_smoothing: float = 0.0) -> Iterator[None]:
        """Let the owner's forwards inside the context return the summed loss as their logits.

        Args:
            labels: class of each place of the logits, int64 [rows, length], -100 for none.
            label_smoothing: share of the target that all classes get alike.
        """
        head = self.head
        final_bias = self.owner._buffers.get(_BIAS)

        def score(hidden: Tensor) -> Tensor:
            bias = head.bias
            if final_bias is not None:
                added = final_bias[0].to(hidden.dtype)
                bias = added if bias is None else bias + added
            return linear_cross_entropy(
                hidden, head.weight, labels, bias=bias, label_smoothing=label_smoothing
            )

        with _forward_of(head, score):
            if final_bias is not None:
                self.owner._buffers[_BIAS] = final_bias.new_zeros(())
            try:
                yield
            finally:
                if final_bias is not None:
                    self.owner._buffers[_BIAS] = final_bias


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Give one module another forward inside the context; its hooks stay."""
    assert "forward" not in vars(module)
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
