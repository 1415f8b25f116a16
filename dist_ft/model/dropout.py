"""Dropout of the parts of a model (Srivastava et al. 2014), set on its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any

from torch import nn

from dist_ft.model.backbone import MultiTaskModel
from dist_ft.model.layer_groups import LayerGroup

PARTS = ("embeddings", "attention", "hidden", "head")
# What modules that compute attention call their projections, and dropout that is not on its
# probabilities but on what they return.
_PROJECTIONS = {
    "query", "key", "q_proj", "q", "q_lin", "qkv", "Wqkv", "c_attn", "query_key_value", "qkv_proj",
    "in_proj", "query_proj",
}  # fmt: skip
_ON_OUTPUT = {"resid_dropout", "out_drop", "output_dropout", "activation_dropout"}

# A part of the model, the probability as it is, and what sets it.
_Place = tuple[str, float, Callable[[float], None]]


def set_dropout(
    model: MultiTaskModel, *, groups: Sequence[LayerGroup], probabilities: dict[str, float]
) -> None:
    """Set the dropout of some parts of `model`; the others keep theirs.

    Args:
        model: The model.
        groups: Its layer groups.
        probabilities: By part: ``embeddings``, ``attention`` (the attention's probabilities),
            ``hidden`` (all else in blocks), ``head``.

    Raises:
        ValueError: If the model has no dropout in a part.
    """
    places = list(_places(model, groups))
    for part, probability in probabilities.items():
        setters = [put for where, _, put in places if where == part]
        if not setters:
            has = sorted({where for where, _, _ in places})
            raise ValueError(
                f"regularization.dropout.{part}: {type(model.backbone).__name__} has no dropout "
                f"there; it has some in {', '.join(has) or 'no part'}: remove the key"
            )
        for put in setters:
            put(probability)


def has_dropout(model: MultiTaskModel, *, groups: Sequence[LayerGroup]) -> bool:
    """Return whether two forwards of `model` in training differ."""
    return any(probability > 0 for _, probability, _ in _places(model, groups))


def largest_dropout(model: MultiTaskModel, *, groups: Sequence[LayerGroup], part: str) -> float:
    """Return the largest dropout that `model` has in a part of it; 0 if it has none there."""
    places = _places(model, groups)
    return max((probability for where, probability, _ in places if where == part), default=0.0)


def _places(model: MultiTaskModel, groups: Sequence[LayerGroup]) -> Iterator[_Place]:
    blocks = {id(m) for m in _block_modules(model, groups)}
    inside = {id(m) for m in model.backbone.modules()}
    for module in model.modules():
        of_head = id(module) not in inside
        if isinstance(module, nn.ModuleDict):  # an adapter's, which has a setting of its own
            continue
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                part = _part(module, name=name, of_head=of_head, in_block=id(child) in blocks)
                yield part, child.p, _setter(child, "p")
        if isinstance(module, nn.Dropout) or of_head:
            continue
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                part = _part(module, name=name, of_head=False, in_block=id(module) in blocks)
                yield part, value, _setter(module, name)


def _block_modules(model: MultiTaskModel, groups: Sequence[LayerGroup]) -> Iterator[nn.Module]:
    """Yield every module that is in a block: those whose path lies below the block's."""
    prefixes = tuple(_common_path(g.parameters) + "." for g in groups if g.kind == "block")
    for path, module in model.named_modules():
        if f"{path}.".startswith(prefixes):
            yield module


def _common_path(parameters: Sequence[str]) -> str:
    paths = [name.split(".") for name in parameters]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared)


def _part(owner: nn.Module, *, name: str, of_head: bool, in_block: bool) -> str:
    if of_head:
        return "head"
    if not in_block:
        return "embeddings"
    attends = not _PROJECTIONS.isdisjoint(dict(owner.named_children()))
    return "attention" if attends and name not in _ON_OUTPUT else "hidden"


def _setter(module: Any, name: str) -> Callable[[float], None]:
    return lambda probability: setattr(module, name, probability)
