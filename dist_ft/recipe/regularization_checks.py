"""Regularisation that contradicts itself or other sections of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dist_ft.config import Recipe, TaskConfig, TextClassificationConfig
from dist_ft.config_data import BanditMixtureConfig
from dist_ft.config_regularization import FixedBalancing, FreeLBConfig, SmartConfig
from dist_ft.recipe.errors import Finding, closest, show_value
from dist_ft.recipe.model_folder import count_blocks
from dist_ft.recipe.reading import RawPath
from dist_ft.recipe.validate import Draft

_OF_TASKS = ("label_smoothing", "r_drop", "neftune_alpha", "adversarial", "cutoff", "mixup")
# What compares the choices of two forwards, or takes apart those of one.
_OF_CHOICES = ("label_smoothing", "r_drop", "cutoff")
# What is done to the words of a row, or to their embeddings.
_OF_WORDS = ("neftune_alpha", "adversarial", "cutoff", "mixup")
# Of bf16 or fp16 beside embeddings of the usual size, 0.05: less is lost in rounding.
_LEAST_RADIUS = 1e-3


def check_regularization(draft: Draft, recipe: Recipe) -> Iterator[Finding]:
    """Return what makes no sense in a recipe's regularisation and weights of losses."""
    if draft.is_sure("balancing"):
        yield from _check_balancing(recipe)
    if not draft.is_sure("regularization"):
        return
    yield from _check_penalties(recipe)
    yield from _check_tasks(draft, recipe)
    yield from _check_words(draft, recipe)
    yield from _check_cache(recipe)
    blocks = count_blocks(recipe.model.path) if draft.is_sure("model", "path") else None
    wanted = recipe.regularization.reinitialize_blocks
    if blocks is not None and wanted is not None and wanted > blocks:
        rule = f"must be at most {blocks}, the number of the model's blocks"
        yield Finding(("regularization", "reinitialize_blocks"), f"{rule}, got {wanted}: lower it")


def _check_balancing(recipe: Recipe) -> Iterator[Finding]:
    config = recipe.balancing
    if isinstance(config, FixedBalancing):
        paths = {name: ("balancing", "weights", name) for name in config.weights}
        yield from _check_names(recipe, paths)
    elif len(recipe.tasks) == 1:
        text = f"weighs tasks against each other, got one task and {config.policy}: remove it"
        yield Finding(("balancing", "policy"), text)
    mixture = recipe.mixture
    rewards = isinstance(mixture, BanditMixtureConfig) and mixture.reward == "loss"
    if rewards and not isinstance(config, FixedBalancing):
        text = (
            f"{config.policy} changes the losses that mixture.policy: bandit follows: use "
            "mixture.reward: gain or another policy"
        )
        yield Finding(("balancing", "policy"), text)
    if config.policy == "gradnorm" and recipe.engine.precision == "fp16":
        text = (
            "measures gradients, which fp16 scales by a factor of its own: use engine.precision "
            "bf16 or another policy"
        )
        yield Finding(("balancing", "policy"), text)


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


def _check_tasks(draft: Draft, recipe: Recipe) -> Iterator[Finding]:
    rules = recipe.regularization
    names = [t.name for t in recipe.tasks]
    chosen = enumerate(rules.tasks or [])
    yield from _check_names(recipe, {n: ("regularization", "tasks", i) for i, n in chosen})
    if rules.tasks is not None and not any(getattr(rules, key) for key in _OF_TASKS):
        text = f"limits {', '.join(_OF_TASKS)}, and none is set: set one or remove it"
        yield Finding(("regularization", "tasks"), text)
    keys = [key for key in _OF_CHOICES if getattr(rules, key)]
    keys += ["adversarial"] if isinstance(rules.adversarial, SmartConfig) else []
    keys += ["mixup"] if rules.mixup else []
    for key in keys:
        for task in recipe.tasks:
            reason = _unsuited(task, key)
            if (
                reason is not None
                and task.name in (rules.tasks or names)
                and draft.is_sure("tasks")
            ):
                text = (
                    f"can't be used with task {task.name}, {reason}: list the other tasks in "
                    f"regularization.tasks, or remove {key}"
                )
                yield Finding(("regularization", key), text)
    yield from _check_forwards(recipe)


def _check_words(draft: Draft, recipe: Recipe) -> Iterator[Finding]:
    others = [t for t in recipe.tasks if t.takes != "text"]
    if not others or not draft.is_sure("tasks"):
        return
    for key in _OF_WORDS:
        if getattr(recipe.regularization, key):
            text = f"changes words, and task {others[0].name} has {others[0].takes}: remove it"
            yield Finding(("regularization", key), text)


def _check_forwards(recipe: Recipe) -> Iterator[Finding]:
    """Return what two of the rules, or a rule and the engine, do to one another."""
    rules, recomputes = recipe.regularization, recipe.model.activation_checkpointing
    for key in ("r_drop", "adversarial", "cutoff"):
        if getattr(rules, key) and recomputes == "reentrant":
            text = (
                "runs each block twice in a micro-batch, which model.activation_checkpointing: "
                "reentrant reduces twice: set that to non_reentrant"
            )
            yield Finding(("regularization", key), text)
    if rules.mixup and recomputes != "none":
        text = "mixes rows that a recomputed block would not mix again: set "
        yield Finding(("regularization", "mixup"), f"{text}model.activation_checkpointing=none")
    if rules.mixup and recipe.train.layout == "packed":
        text = "mixes rows side by side, which packed ones are not: set train.layout=by_length"
        yield Finding(("regularization", "mixup"), text)
    if rules.r_drop and isinstance(rules.adversarial, FreeLBConfig):
        text = "has two forwards of its own, and so has adversarial: freelb: remove one of them"
        yield Finding(("regularization", "r_drop"), text)
    smart = rules.adversarial
    low = recipe.engine.precision != "fp32"
    if isinstance(smart, SmartConfig) and low and smart.radius < _LEAST_RADIUS:
        text = (
            f"is lost in the rounding of {recipe.engine.precision} below {_LEAST_RADIUS:g}, got "
            f"{smart.radius:g}: raise it and step_size, or set engine.precision=fp32"
        )
        yield Finding(("regularization", "adversarial", "radius"), text)


def _check_names(recipe: Recipe, paths: Mapping[str, RawPath]) -> Iterator[Finding]:
    names = [t.name for t in recipe.tasks]
    for name, path in paths.items():
        if name not in names:
            meant = closest(name, names)
            remedy = f"did you mean {meant}?" if meant else f"use one of {', '.join(names)}"
            text = f"must be the name of a task, got {show_value(name)}: {remedy}"
            yield Finding(path, text)


def _unsuited(task: TaskConfig, key: str) -> str | None:
    """Return why a task has no such loss."""
    if isinstance(task, TextClassificationConfig) and task.problem != "single_label":
        return f"whose problem ({task.problem}) has no choice of one class"
    if task.type == "question_answering" and key == "label_smoothing":
        return "whose classes are the tokens of a window"
    if key == "mixup" and task.type != "text_classification":
        return "whose rows have a label for each token"
    return None


def _check_cache(recipe: Recipe) -> Iterator[Finding]:
    rules = recipe.regularization
    if recipe.cache.policy != "on":
        return
    for path, value in (
        (("neftune_alpha",), rules.neftune_alpha),
        (("adversarial",), rules.adversarial),
        (("cutoff",), rules.cutoff),
        (("mixup",), rules.mixup),
        (("dropout", "embeddings"), rules.dropout.embeddings),
    ):
        if value:
            text = (
                "changes what goes through a prefix each time, so cache.policy: on has nothing "
                "to keep: set cache.policy=auto, or remove it"
            )
            yield Finding(("regularization", *path), text)
