"""What of a trunk's output a task's head gets: no more than it reads.

A classifier on BERT and its kin reads the first token of each row, and a head that labels tokens
treats each for itself: neither needs the padded rows [rows, length, hidden size] that transformers
hands it. To make them, and to run a head's dropout and projection on padding, takes longer than a
whole step of a small head whose trunk is cached.

`reads_only` finds out by running the model both ways. It lets in only tasks whose outputs are
logits, and models whose modules all are those of known libraries: a gate of somebody's own may read
other tokens once it has learned to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dist_ft.model.backbone import MultiTaskModel
from dist_ft.model.flat_rows import FlatRows
from dist_ft.model.probe import LOSS_OUTPUTS, MISFITS, SAME

# padded: [rows, length, hidden size]. firsts: the first token of each row, [rows, 1, hidden size].
# tokens: one row of all tokens, [1, tokens, hidden size]; outputs are put back among the padding.
Form = Literal["padded", "firsts", "tokens"]

_KNOWN = ("torch.", "transformers.", "peft.", "dist_ft.")


def laid_out(hidden: Tensor, rows: FlatRows, *, form: Form, is_narrow: bool = False) -> Tensor:
    """Return what heads get.

    Args:
        hidden: [1, tokens, hidden size].
        rows: the micro-batch.
        form: what they read.
        is_narrow: whether `hidden` has the first token of each row that has any, and no others.
    """
    if form == "tokens":
        return hidden
    if form == "firsts":
        return rows.by_row(hidden if is_narrow else rows.pick_firsts(hidden))
    return rows.pad(hidden)


def pad_outputs(outputs: Any, rows: FlatRows) -> None:
    """Put a model's outputs of all tokens in one row, [1, tokens, ...], back among the padding."""
    for name in LOSS_OUTPUTS:
        if (value := outputs.get(name)) is not None:
            outputs[name] = rows.pad(value)


def reads_only(
    form: Form, model: MultiTaskModel, task: str, *, inputs: Mapping[str, Tensor], trunk: Any
) -> bool:
    """Return whether a task's head reads nothing of other tokens, as `form` supposes.

    Args:
        form: ``firsts`` or ``tokens``.
        model: in full precision, in eval mode and not yet partitioned; it is left as it was.
        task: the task.
        inputs: rows of different lengths.
        trunk: the trunk, which can run without padding.
    """
    if not all(type(m).__module__.startswith(_KNOWN) for m in model.modules()):
        return False
    try:
        trunk.prepare(None)
        plain = _logits_of_own_tokens(form, model, task, inputs=inputs, block=trunk.blocks[-1])
        trunk.forms[task] = form
        trunk.prepare(FlatRows.of(inputs["attention_mask"].cpu(), device=plain.device), task=task)
        with torch.no_grad():
            error = _logits(model, task, inputs) - plain
        if form == "tokens":
            mask = inputs["attention_mask"].bool()
            error, plain = error[mask], plain[mask]
        return bool(error.abs().max() <= SAME * plain.abs().max())
    except MISFITS:
        return False
    finally:
        trunk.forms.pop(task, None)
        trunk.prepare(None)


def _logits_of_own_tokens(
    form: Form,
    model: MultiTaskModel,
    task: str,
    *,
    inputs: Mapping[str, Tensor],
    block: nn.Module,
) -> Tensor:
    """Return a task's logits.

    Raises:
        ValueError: They are not of the kind, or have a gradient at tokens that are not theirs.
    """
    with _cut(block) as hidden, torch.enable_grad():
        logits = _logits(model, task, inputs)
        if form == "tokens" and logits.shape[:2] != inputs["attention_mask"].shape:
            raise ValueError("there is not one for each token")
        if form == "firsts" and logits.dim() != 2:
            raise ValueError("there is not one for each row")
        for place in (0,) if form == "firsts" else (0, 1):
            seen = logits if form == "firsts" else logits[:, place]
            weights = torch.linspace(-1, 1, seen.numel(), device=seen.device)
            loss = (seen.flatten() * weights).sum()
            (gradient,) = torch.autograd.grad(loss, hidden, retain_graph=True)
            others = torch.arange(gradient.shape[1], device=seen.device) != place
            if not gradient[:, place].any(-1).all() or gradient[:, others].any():
                raise ValueError("they come from other tokens, too")
    return logits.detach()


def _logits(model: MultiTaskModel, task: str, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return a task's logits, those of several kinds side by side.

    Raises:
        ValueError: It has other outputs: a loss could read hidden states, if there are some.
    """
    outputs = {k: v for k, v in model(task, inputs).items() if v is not None and k != "loss"}
    if not outputs or not outputs.keys() <= set(LOSS_OUTPUTS):
        raise ValueError(f"outputs {sorted(outputs)}")
    values = list(outputs.values())
    return values[0] if len(values) == 1 else torch.stack(values, dim=-1)


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
