"""Turns the recipe's regularisation into what model and optimizer take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set

from dist_ft.config import Recipe
from dist_ft.duration import Duration
from dist_ft.model.backbone import MultiTaskModel
from dist_ft.model.dropout import has_dropout, set_dropout
from dist_ft.model.layer_groups import LayerGroup
from dist_ft.model.lora import is_adapter
from dist_ft.model.new_blocks import reinitialize_top
from dist_ft.optim.averaging import Averaging
from dist_ft.optim.penalties import PenaltyRules


def penalty_rules(
    recipe: Recipe, groups: Sequence[LayerGroup], *, fresh: Set[str] = frozenset()
) -> PenaltyRules:
    """Return which penalties parameter groups get.

    Args:
        recipe: The recipe.
        groups: The model's layer groups.
        fresh: Parameters of the backbone that its checkpoint lacks.
    """
    config = recipe.regularization
    pull = config.l2_sp
    blocks = [g.name for g in groups if g.kind == "block"]
    new_pull = 0.0
    if pull is not None:
        new_pull = pull.strength if pull.heads is None else pull.heads
    return PenaltyRules(
        l1=config.l1,
        l2=config.l2,
        l2_sp=0.0 if pull is None else pull.strength,
        l2_sp_new=new_pull,
        mixout=config.mixout or 0.0,
        new=frozenset(blocks[len(blocks) - (config.reinitialize_blocks or 0) :])
        | {g.name for g in groups if all(is_adapter(n) or n in fresh for n in g.trained)},
        known_heads=frozenset(f"head.{t.name}" for t in recipe.tasks if t.type == "generation"),
    )


def averaging(recipe: Recipe, *, to_steps: Callable[[Duration], int]) -> Averaging | None:
    """Return which average of the weights is kept."""
    config = recipe.regularization.averaging
    if config is None:
        return None
    return Averaging(
        config.type,
        start=to_steps(config.start),
        every=max(1, to_steps(config.every)),
        decay=getattr(config, "decay", 0.0),
    )


def prepare_model(
    recipe: Recipe,
    model: MultiTaskModel,
    *,
    groups: Sequence[LayerGroup],
    trains: Iterable[str],
) -> None:
    """Set a model's dropout and give its top blocks new weights, as the recipe says.

    Args:
        recipe: The recipe.
        model: The model, just loaded.
        groups: Its layer groups.
        trains: Layer groups that some phase trains.

    Raises:
        ValueError: If the model can't, or new blocks would never train.
    """
    config = recipe.regularization
    chosen = config.dropout.model_dump(exclude_none=True)
    if chosen:
        set_dropout(model, groups=groups, probabilities=chosen)
    if config.r_drop and not config.neftune_alpha and not has_dropout(model, groups=groups):
        raise ValueError(
            f"regularization.r_drop: {type(model.backbone).__name__} has no dropout, so two "
            "forwards are the same: set regularization.dropout, or remove it"
        )
    if config.reinitialize_blocks is not None:
        new = reinitialize_top(
            model, groups=groups, blocks=config.reinitialize_blocks, seed=recipe.seed
        )
        if frozen := [name for name in new if name not in set(trains)]:
            raise ValueError(
                f"regularization.reinitialize_blocks: {', '.join(frozen)} would start from random "
                "weights and never train: lower it, or change freezing"
            )


def changes_hidden_states(recipe: Recipe) -> str | None:
    """Return what makes a frozen prefix return something else each time, or None."""
    config = recipe.regularization
    for key in ("neftune_alpha", "adversarial", "cutoff", "mixup"):
        if getattr(config, key):
            return f"regularization.{key} changes what goes through it each time"
    if config.dropout.embeddings:
        return "regularization.dropout.embeddings changes the embeddings each time"
    return None
