"""Finds the rows of the word embeddings that a recipe freezes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dist_ft.config import Recipe
from dist_ft.model.backbone import MultiTaskModel
from dist_ft.optim.param_groups import ParamGroup, hold_rows


def with_frozen_rows(
    groups: Sequence[ParamGroup], recipe: Recipe, *, model: MultiTaskModel
) -> list[ParamGroup]:
    """Return the parameter groups with the recipe's rows of the word embeddings held.

    Raises:
        ValueError: If the model has no such rows, or none would be left to train.
    """
    ranges = recipe.freezing.frozen_embedding_rows
    if not ranges:
        return list(groups)
    where = "freezing.frozen_embedding_rows"
    backbone: Any = model.backbone
    table = backbone.get_input_embeddings()
    weight = getattr(table, "weight", None)
    name = next((n for n, p in model.named_parameters() if p is weight), None)
    if weight is None or name is None:
        raise ValueError(f"{where}: {type(backbone).__name__} has no word embeddings: remove it")
    count = weight.shape[0]
    for first, end in ranges:
        if not first < end <= count:
            raise ValueError(
                f"{where}: ranges of rows [first, end) within 0 to {count}, got [{first}, {end}]: "
                "correct it"
            )
    if len({row for first, end in ranges for row in range(first, end)}) == count:
        raise ValueError(
            f"{where}: no row of {name} is left to train: freeze the group of the embeddings "
            "(freezing.policy static), which costs nothing then"
        )
    return hold_rows(groups, name, rows=ranges)
