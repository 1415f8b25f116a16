"""The last block of an encoder, run for the tokens that a head reads only.

A classifier on BERT and its kin reads the first token of each row. Of the last block all that the
other tokens have to give is their keys and values; their queries, the attention they pay, and the
sublayers behind it are computed for nobody, forward and backward: five sixths of the block's matrix
products. Where the blocks below are frozen and cached, that is most of a step.

Four hooks cut those tokens off, and the forward of the transformers class runs unchanged: the query
projection gets the first tokens (and its output is put back among zeros, as models reshape it), the
attention answers these queries, and the sublayer behind the attention gets the first tokens of what
attention returns and of what is added to it. What the head sees of other tokens is zero.

`find` looks for a block of that form, and `LastBlock.admit` lets a task in that returns nothing but
logits, which have no gradient at any other token and stay the same, and whose modules all are those
of known libraries.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dist_ft.model.backbone import MultiTaskModel
from dist_ft.model.flat_rows import FlatRows

# What the projection of queries is called in attention modules.
_QUERIES = ("query", "q_proj", "q_lin", "q")
# The sublayer behind the attention, which adds what went into the block.
_ARGUMENTS = ["hidden_states", "input_tensor"]
# Largest difference of two fp32 forwards, as a share of the largest value.
_SAME = 1e-4


@dataclass
class LastBlock:
    """The last block of a trunk, in the form that BERT gave it.

    Attributes:
        block: the block.
        query: its projection of queries.
        sublayer: what follows its attention, called with hidden states and what is added to them.
        tasks: tasks whose heads read the first token of each row only.
        rows: the micro-batch that runs so; None runs the block as transformers made it.
    """

    block: nn.Module
    query: nn.Module
    sublayer: nn.Module
    tasks: set[str] = field(default_factory=set)
    rows: FlatRows | None = None

    @classmethod
    def find(cls, block: nn.Module) -> LastBlock | None:
        """Return `block` with its hooks in place, which do nothing yet; None for other forms."""
        queries = [m for n, m in block.named_modules() if n.rpartition(".")[2] in _QUERIES]
        sublayers = [m for m in block.modules() if _takes_both(m)]
        if len(queries) != 1 or not sublayers:
            return None
        found = cls(block, queries[0], sublayers[0])
        found.query.register_forward_pre_hook(found._select)
        found.query.register_forward_hook(found._put_back)
        found.sublayer.register_forward_pre_hook(found._select)
        for module in block.modules():
            vars(module)["last_block"] = found  # where the attention finds it
        return found

    def _select(self, module: nn.Module, args: Any) -> Any:
        del module
        if self.rows is None:
            return None
        return tuple(a.index_select(1, self.rows.firsts) for a in args)

    def _put_back(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        del module, args
        if self.rows is None:
            return None
        everywhere = output.new_zeros(1, self.rows.tokens, output.shape[2])
        return everywhere.index_copy(1, self.rows.firsts, output)

    def admit(
        self, model: MultiTaskModel, task: str, *, inputs: Mapping[str, Tensor], trunk: Any
    ) -> bool:
        """Let a task run so if its head reads nothing but first tokens; return whether it does.

        Args:
            model: in full precision, in eval mode and not yet partitioned; it is left as it was.
            task: the task.
            inputs: rows of different lengths.
            trunk: the trunk, which can run without padding.
        """
        if not all(type(m).__module__.startswith(_KNOWN) for m in model.modules()):
            return False
        try:
            trunk.prepare(None)
            with _cut(self.block) as hidden, torch.enable_grad():
                plain = _logits(model, task, inputs)
                if plain is None:
                    return False
                weights = torch.linspace(-1, 1, plain.numel(), device=plain.device)
                (gradient,) = torch.autograd.grad((plain.flatten() * weights).sum(), hidden)
            if not gradient[:, 0].any(-1).all() or gradient[:, 1:].any():
                return False
            rows = FlatRows.of(inputs["attention_mask"].cpu(), device=plain.device)
            self.tasks.add(task)
            trunk.prepare(rows, task=task)
            with torch.no_grad():
                narrow = _logits(model, task, inputs)
                same = (
                    narrow is not None and (narrow - plain).abs().max() <= _SAME * plain.abs().max()
                )
            if not same:
                self.tasks.discard(task)
        except _ERRORS:
            self.tasks.discard(task)
        finally:
            trunk.prepare(None)
        return task in self.tasks


# What a model may raise that is run in a way which it was not made for.
_ERRORS = (ValueError, RuntimeError, TypeError, AttributeError, LookupError, AssertionError)
# Whose modules are known: a gate of somebody's own may read other tokens once it has learned to.
_KNOWN = ("torch.", "transformers.", "peft.", "dist_ft.")


def _takes_both(module: nn.Module) -> bool:
    return list(inspect.signature(module.forward).parameters) == _ARGUMENTS


def _logits(model: MultiTaskModel, task: str, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Return a classifier's logits [rows, classes]; None where a task has other outputs."""
    outputs = model(task, inputs)
    logits = outputs.get("logits")
    if logits is None or logits.dim() != 2:
        return None
    # A loss could read hidden states that a configuration asks for.
    others = {key for key, value in outputs.items() if value is not None} - {"logits", "loss"}
    return None if others else logits


@contextmanager
def _cut(block: nn.Module) -> Iterator[list[Tensor]]:
    """Let what the block returns start a graph of its own inside the context, and show it."""
    found: list[Tensor] = []

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        del module, args
        hidden = (output[0] if isinstance(output, tuple) else output).detach().requires_grad_()
        found.append(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = block.register_forward_hook(cut)
    try:
        yield found
    finally:
        handle.remove()
