"""Takes the kernels that a recipe allows and its model can use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from dist_ft.config import Recipe
from dist_ft.engine.base import DTYPES
from dist_ft.engine.loss_module import FusedLoss, InTraining
from dist_ft.engine.trunk_passes import TrunkPasses
from dist_ft.kernels.ops import REFERENCE, Place, choose
from dist_ft.model.backbone import MultiTaskModel
from dist_ft.model.scoring_head import ScoringHead
from dist_ft.tasks.base import Task
from dist_ft.tasks.generation import Generation

# Parts of `regularization` whose losses are made of outputs, in more than one forward.
_WHOLE_LOGITS = ("r_drop", "adversarial", "cutoff", "mixup")


@dataclass(frozen=True)
class Kernels:
    """What runs the operations of a run.

    Attributes:
        chosen: name of the implementation of each operation.
        fused: tasks whose heads compute the loss themselves in training.
    """

    chosen: dict[str, str]
    fused: dict[str, FusedLoss]

    def used_in(self, training: InTraining) -> InTraining:
        """Return what is different in training, with the losses that heads compute."""
        return replace(training, fused=self.fused)

    def record(self, passes: TrunkPasses) -> dict[str, str]:
        """Return what runs each operation, for the run's record."""
        flat = passes.trunk is not None and passes.trunk.flat
        return self.chosen if flat else {**self.chosen, "attention": REFERENCE}


def take_kernels(
    recipe: Recipe,
    model: MultiTaskModel,
    *,
    tasks: Sequence[Task],
    device: torch.device,
    say: Callable[[str], None],
) -> Kernels:
    """Return the kernels to use; a fallback is said once, with its reason.

    Args:
        recipe: the recipe.
        model: the model in full precision, not yet partitioned.
        tasks: its tasks.
        device: where it will run.
        say: tells a person.

    Raises:
        ValueError: `kernels` is ``strict`` and something would fall back to plain torch.
    """
    place = Place(device.type, DTYPES[recipe.engine.precision])
    choices = choose(place, policy=recipe.kernels, device=device)
    problems = {op: c.problem for op, c in choices.items() if c.problem}
    chosen = {op: c.implementation for op, c in choices.items()}
    fused: dict[str, FusedLoss] = {}
    generating = [t for t in tasks if isinstance(t, Generation)]
    if chosen["linear_cross_entropy"] != REFERENCE:
        fused, problem = _fused_losses(recipe, model, tasks=generating)
        problems |= {"linear_cross_entropy": problem} if problem else {}
        if not fused:
            chosen["linear_cross_entropy"] = REFERENCE
    for op, problem in problems.items():
        if recipe.kernels == "strict":
            raise ValueError(
                f"kernels: strict, but {op} would be run by plain torch, as {problem}: use auto"
            )
        say(f"kernels: {op} is run by plain torch: {problem}")
    return Kernels(chosen, fused)


def _fused_losses(
    recipe: Recipe, model: MultiTaskModel, *, tasks: Sequence[Generation]
) -> tuple[dict[str, FusedLoss], str | None]:
    """Return the losses that heads can compute, and why some task's can't."""
    config = recipe.regularization
    fused: dict[str, FusedLoss] = {}
    problem: str | None = None
    for task in tasks:
        regularized = config.tasks is None or task.name in config.tasks
        whole = [k for k in _WHOLE_LOGITS if regularized and getattr(config, k)]
        if whole:
            problem = f"task {task.name}: regularization.{whole[0]} needs whole logits"
            continue
        try:
            head = ScoringHead.find(model, task.name)
        except ValueError as error:
            problem = f"task {task.name}: {error}"
            continue
        smoothing = (config.label_smoothing or 0.0) if regularized else 0.0
        fused[task.name] = FusedLoss(head, task.logit_labels, smoothing)
    return fused, problem
