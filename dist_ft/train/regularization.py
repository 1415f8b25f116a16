"""Turns the recipe's regularisation into what model, losses and optimizer take."""

from __future__ import annotations

from dist_ft.config import Recipe
from dist_ft.optim.penalties import PenaltyRules


def penalty_rules(recipe: Recipe) -> PenaltyRules:
    """Return which penalties parameter groups get."""
    config = recipe.regularization
    if config.l2_sp is None:
        return PenaltyRules(l1=config.l1, l2=config.l2)
    heads = config.l2_sp.heads
    return PenaltyRules(
        l1=config.l1,
        l2=config.l2,
        l2_sp=config.l2_sp.strength,
        l2_sp_new=config.l2_sp.strength if heads is None else heads,
    )
