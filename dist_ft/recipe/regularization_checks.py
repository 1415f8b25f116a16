"""Regularisation that contradicts itself or other sections of a recipe."""

from __future__ import annotations

from collections.abc import Iterator

from dist_ft.config import Recipe
from dist_ft.recipe.errors import Finding
from dist_ft.recipe.validate import Draft


def check_regularization(draft: Draft, recipe: Recipe) -> Iterator[Finding]:
    """Return what makes no sense in a recipe's regularisation."""
    if draft.is_sure("regularization"):
        yield from _check_penalties(recipe)


def _check_penalties(recipe: Recipe) -> Iterator[Finding]:
    rules, decay = recipe.regularization, recipe.optim.weight_decay
    if rules.l2 and rules.l2_sp:
        text = "pulls to zero what l2_sp pulls to the pre-trained weights: remove one of them"
        yield Finding(("regularization", "l2"), text)
    for key in ("l2", "l2_sp"):
        if getattr(rules, key) and decay:
            text = (
                f"pulls at weights that optim.weight_decay ({decay}) pulls to zero already: "
                f"set optim.weight_decay=0 or remove {key}"
            )
            yield Finding(("regularization", key), text)
