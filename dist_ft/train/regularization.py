"""Turns the recipe's regularisation into what model, losses and optimizer take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dist_ft.config import Recipe
from dist_ft.engine.loss_module import InTraining
from dist_ft.model.backbone import MultiTaskModel
from dist_ft.model.dropout import has_dropout, set_dropout
from dist_ft.model.embedding_noise import EmbeddingNoise
from dist_ft.model.layer_groups import LayerGroup
from dist_ft.model.new_blocks import reinitialize_top
from dist_ft.optim.penalties import PenaltyRules
from dist_ft.tasks.base import Task
from dist_ft.tasks.output_regularization import OutputRegularizer


def penalty_rules(recipe: Recipe, groups: Sequence[LayerGroup]) -> PenaltyRules:
    """Return which penalties parameter groups get."""
    config = recipe.regularization
    if config.l2_sp is None:
        return PenaltyRules(l1=config.l1, l2=config.l2)
    heads = config.l2_sp.heads
    blocks = [g.name for g in groups if g.kind == "block"]
    return PenaltyRules(
        l1=config.l1,
        l2=config.l2,
        l2_sp=config.l2_sp.strength,
        l2_sp_new=config.l2_sp.strength if heads is None else heads,
        new=frozenset(blocks[len(blocks) - (config.reinitialize_blocks or 0) :]),
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


def in_training(recipe: Recipe, model: MultiTaskModel, *, tasks: Sequence[Task]) -> InTraining:
    """Return what is different in the forward pass of training; hooks `model` if it gets noise."""
    config = recipe.regularization
    chosen = [t for t in tasks if config.tasks is None or t.name in config.tasks]
    losses: dict[str, OutputRegularizer] = {}
    if config.label_smoothing or config.r_drop:
        losses = {
            t.name: OutputRegularizer(
                t.loss, t.choices, config.label_smoothing or 0.0, config.r_drop or 0.0
            )
            for t in chosen
        }
    if config.neftune_alpha is None:
        return InTraining(losses, weights=recipe.balancing.weights)
    noise = EmbeddingNoise(model, alpha=config.neftune_alpha)
    noisy = frozenset(t.name for t in chosen)
    return InTraining(losses, noise, noisy, recipe.balancing.weights)


def changes_embeddings(recipe: Recipe) -> str | None:
    """Return what makes a frozen prefix return something else each time, or None."""
    config = recipe.regularization
    if config.neftune_alpha:
        return "regularization.neftune_alpha changes the embeddings each time"
    if config.dropout.embeddings:
        return "regularization.dropout.embeddings changes them each time"
    return None
