"""The losses that tasks train on: their own with the recipe's regularisation and a program's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dist_ft.config import Recipe
from dist_ft.config_regularization import RegularizationConfig, SmartConfig
from dist_ft.engine.adversary import FreeLB, Smart
from dist_ft.engine.loss_module import InTraining
from dist_ft.engine.objective import Cutoff, Objective
from dist_ft.model.embedding_noise import EmbeddingNoise
from dist_ft.model.hidden_mixup import HiddenMixup
from dist_ft.model.word_embeddings import WordEmbeddings
from dist_ft.tasks.base import Task
from dist_ft.tasks.output_regularization import OutputRegularizer
from dist_ft.train.parts import Parts

_OF_THE_LOSS = ("label_smoothing", "r_drop", "adversarial", "cutoff", "mixup")


def in_training(recipe: Recipe, parts: Parts, *, weights: Mapping[str, float]) -> InTraining:
    """Return what is different in the forward pass of training; hooks the model if it changes.

    Args:
        recipe: The recipe.
        parts: Model, tasks, layer groups, and regularizers that a program adds.
        weights: What each task's loss weighs; may change from step to step.
    """
    config, own = recipe.regularization, parts.regularizers
    tasks = [t.task for t in parts.tasks]
    chosen = [t for t in tasks if config.tasks is None or t.name in config.tasks]
    losses = {
        t.name: Objective(OutputRegularizer(t.loss, t.choices, penalty=own[t.name]))
        for t in tasks
        if t.name in own
    }
    if any(getattr(config, key) for key in _OF_THE_LOSS):
        losses |= _objectives(config, parts, tasks=chosen)
    if config.neftune_alpha is None:
        return InTraining(losses, weights=weights, whole_logits=frozenset(own))
    noise = EmbeddingNoise(parts.model, alpha=config.neftune_alpha)
    noisy = frozenset(t.name for t in chosen)
    return InTraining(losses, noise, noisy, weights, whole_logits=frozenset(own))


def _objectives(
    config: RegularizationConfig, parts: Parts, *, tasks: Sequence[Task]
) -> dict[str, Objective]:
    model, own = parts.model, parts.regularizers
    changing = [key for key in ("adversarial", "cutoff") if getattr(config, key)]
    words = WordEmbeddings(model, key=changing[0]) if changing else None
    cutoff = config.cutoff and Cutoff(**config.cutoff.model_dump())
    mixup = config.mixup and HiddenMixup(
        model, groups=parts.groups, blocks=config.mixup.blocks, alpha=config.mixup.alpha
    )
    adversary: Smart | FreeLB | None = None
    if config.adversarial is not None:
        kind = Smart if isinstance(config.adversarial, SmartConfig) else FreeLB
        adversary = kind(**config.adversarial.model_dump(exclude={"type"}))
    return {
        t.name: Objective(
            OutputRegularizer(t.loss, t.choices, config.label_smoothing or 0.0, own.get(t.name)),
            r_drop=config.r_drop or 0.0,
            words=words,
            cutoff=cutoff,
            adversary=adversary,
            mixup=mixup,
        )
        for t in tasks
    }
