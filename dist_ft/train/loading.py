"""From a recipe and its prepared tasks to the steps of a run: how many, of which task and rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dist_ft.config import (
    AnnealedMixture,
    BanditMixtureConfig,
    FixedMixture,
    Recipe,
    RoundRobinMixture,
    UnimaxMixture,
)
from dist_ft.data.bandit import BanditMixture
from dist_ft.data.joined import JoinedLoader
from dist_ft.data.loader import BatchPlan, LengthPlan, StepBatch, StepLoader
from dist_ft.data.mixtures import make_mixture
from dist_ft.data.sampling import Mixture
from dist_ft.duration import Duration
from dist_ft.train.augmentation import make_augmentation
from dist_ft.train.data import PreparedTask, steps_per_epoch, tokens_per_step

# A length in tokens depends on the shares, and the shares of a mixture on the length; rounding can
# keep it moving by a step or two, and then the last stands.
_MOST_ROUNDS = 8


@dataclass(frozen=True)
class Lengths:
    """Turns durations into steps for the tasks of a run."""

    epoch: float
    tokens: float

    def steps(self, duration: Duration) -> int:
        """Return the duration in optimizer steps."""
        return duration.steps(steps_per_epoch=self.epoch, tokens_per_step=self.tokens)


@dataclass(frozen=True)
class StepPlan:
    """What is trained in which step.

    Attributes:
        mixture: Assigns the steps to the tasks.
        lengths: Turns durations into steps.
        total_steps: Optimizer steps of the whole run.
    """

    mixture: Mixture
    lengths: Lengths
    total_steps: int


def plan_steps(recipe: Recipe, tasks: Sequence[PreparedTask]) -> StepPlan:
    """Return the mixture and the length of a run; a pure function of recipe and data."""
    # Rows of a step: those of all its turns.
    turns = recipe.mixture.tasks_per_step
    size = recipe.train.global_batch_size * turns
    epoch = steps_per_epoch(tasks, global_batch_size=size)
    lengths = Lengths(epoch, tokens_per_step(tasks, global_batch_size=size))
    total = lengths.steps(recipe.train.max_duration)
    mixture = _mixture(recipe, tasks, turns=total * turns)
    for _ in range(_MOST_ROUNDS):
        shares = _shares(recipe, mixture, turns=total * turns)
        lengths = Lengths(epoch, tokens_per_step(tasks, global_batch_size=size, shares=shares))
        found = lengths.steps(recipe.train.max_duration)
        if found == total:
            break
        total = found
        mixture = _mixture(recipe, tasks, turns=total * turns)
    return StepPlan(mixture, lengths, total)


def _mixture(recipe: Recipe, tasks: Sequence[PreparedTask], *, turns: int) -> Mixture:
    config = recipe.mixture
    options: dict[str, Any] = config.model_dump(exclude={"policy", "tasks_per_step"})
    if isinstance(config, BanditMixtureConfig):
        return BanditMixture(
            len(tasks), seed=recipe.seed, block_steps=config.every,
            rate=config.rate, smoothing=config.smoothing, reward=config.reward,
        )  # fmt: skip
    # A run of no steps has a mixture, too.
    steps = max(1, turns)
    if isinstance(config, AnnealedMixture):
        options["total_steps"] = steps
    if isinstance(config, UnimaxMixture):
        options["total_rows"] = steps * recipe.train.global_batch_size
    if isinstance(config, FixedMixture):
        options["weights"] = [config.weights[t.task.name] for t in tasks]
    rows = [len(t.datasets["train"]) for t in tasks]
    return make_mixture(config.policy, rows=rows, seed=recipe.seed, **options)


def _shares(recipe: Recipe, mixture: Mixture, *, turns: int) -> list[float] | None:
    """Return each task's share of the run's turns; None where they take turns, or nobody knows."""
    unknown = isinstance(recipe.mixture, RoundRobinMixture | BanditMixtureConfig)
    if unknown or turns < 1:
        return None
    return [count / turns for count in mixture.steps_before(turns)]


def make_loader(
    recipe: Recipe,
    tasks: Sequence[PreparedTask],
    *,
    tokenizer: PreTrainedTokenizerBase,
    mixture: Mixture,
    rank: int = 0,
    world_size: int = 1,
    on_read: Callable[[StepBatch], None] | None = None,
) -> StepLoader | JoinedLoader:
    """Return the loader of a rank's training steps.

    Args:
        recipe: The recipe.
        tasks: Its tasks, prepared.
        tokenizer: The model's.
        mixture: Gives the steps, or the turns of steps, to the tasks.
        rank: This process.
        world_size: How many there are.
        on_read: Called in the thread that reads ahead with the batch of each step, or turn.

    Raises:
        ValueError: If a word list of the augmentation is not readable, or a row doesn't fit into
            a micro-batch.
        RuntimeError: If one is not installed.
    """
    augmentation = {
        config.name: how
        for config, t in zip(recipe.tasks, tasks, strict=True)
        if (how := make_augmentation(config, task=t.task, dataset=t.datasets["train"],
                                     tokenizer=tokenizer, variants=recipe.cache.variants))
    }  # fmt: skip
    loader = StepLoader(
        {t.task.name: t.datasets["train"] for t in tasks},
        specs={t.task.name: t.task.collate_spec(tokenizer, evaluation=False) for t in tasks},
        plan=BatchPlan(
            global_batch_size=recipe.train.global_batch_size,
            micro_batch_size=recipe.train.micro_batch_size,
            seed=recipe.seed,
            rank=rank,
            world_size=world_size,
            layout=_layout(recipe, tasks, world_size=world_size),
        ),
        mixture=mixture,
        augmentation=augmentation,
        pin_memory=torch.cuda.is_available(),
        on_read=on_read,
    )
    turns = recipe.mixture.tasks_per_step
    return loader if turns == 1 else JoinedLoader(loader, turns=turns)


def _layout(recipe: Recipe, tasks: Sequence[PreparedTask], *, world_size: int) -> LengthPlan | None:
    """Return how rows are laid out by length, None if they are not."""
    budget = recipe.train.micro_batch_tokens
    if recipe.train.layout == "in_order":
        return None
    packed = recipe.train.layout == "packed"
    if budget is None:
        return LengthPlan(packed=packed)
    for t in tasks:
        longest = int(t.datasets["train"].lengths.max())
        if longest > budget:
            raise ValueError(
                f"train.micro_batch_tokens: task {t.task.name} has a row of {longest} tokens, more "
                f"than the budget of {budget}: raise it, or lower the task's max_length"
            )
    # As many for every rank: fillers would be forward and backward passes for nothing.
    return LengthPlan(max_tokens=budget, multiple_of=world_size, packed=packed)
