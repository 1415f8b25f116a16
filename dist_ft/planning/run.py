"""The command ``dist-ft plan``: from a recipe to its plan."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dist_ft.config import Recipe
from dist_ft.data.manifest import read_manifest
from dist_ft.data.prepare import split_folder
from dist_ft.planning.cost import Cluster
from dist_ft.planning.hardware import find_hardware
from dist_ft.planning.meta import read_shape
from dist_ft.planning.phases import GUESSED_EPOCH, Epoch, Schedule, schedule_of
from dist_ft.planning.render import plan_json, show_plan
from dist_ft.planning.settings import Plan, cheapest, make_plan, setting_of, with_whole_rows
from dist_ft.planning.shape import ModelShape


@dataclass(frozen=True)
class PlanRequest:
    """Where a recipe is to run.

    Attributes:
        nodes: Machines.
        gpus: Accelerators of each.
        gpu: Their name, see ``planning.hardware``.
        epoch_steps: Optimizer steps of an epoch, if the user knows them; otherwise the rows that
            are prepared already tell.
    """

    nodes: int = 1
    gpus: int = 1
    gpu: str = "h100-80g"
    epoch_steps: int | None = None


@dataclass(frozen=True)
class Outcome:
    """A plan with what it was made from."""

    plan: Plan
    best: Plan | None
    shape: ModelShape
    schedule: Schedule
    cluster: Cluster


def plan_recipe(recipe: Recipe, request: PlanRequest) -> Outcome:
    """Return the plan of a recipe and the cheapest setting that fits.

    Raises:
        ValueError: If the accelerator is unknown, the model's configuration can't be read, or the
            recipe does not fit the model or the number of ranks.
    """
    if request.nodes < 1 or request.gpus < 1:
        raise ValueError(
            f"--nodes, --gpus: must be at least 1, got {request.nodes} and {request.gpus}: raise it"
        )
    hardware = find_hardware(request.gpu)
    cluster = Cluster(hardware, nodes=request.nodes, per_node=request.gpus)
    recipe = with_whole_rows(recipe, world_size=cluster.world_size)
    shape = read_shape(recipe, on_gpu=not hardware.name.startswith("cpu"))
    epoch = _epoch(recipe, given=request.epoch_steps)
    schedule = schedule_of(recipe, shape, epoch=epoch)
    setting = setting_of(recipe, schedule, world_size=cluster.world_size)
    plan = make_plan(shape, schedule=schedule, setting=setting, cluster=cluster)
    best = cheapest(shape, schedule=schedule, setting=setting, cluster=cluster)
    return Outcome(plan, best, shape, schedule, cluster)


def _epoch(recipe: Recipe, *, given: int | None) -> Epoch:
    """Return the length of an epoch: as given, by the prepared rows, or a stated guess."""
    if given is not None:
        return Epoch(given, f"an epoch has {given:,} steps, as given")
    rows = 0
    for task in recipe.tasks:
        try:
            rows += read_manifest(split_folder(recipe.data_dir, task=task.name, split="train")).rows
        except ValueError:
            return GUESSED_EPOCH
    steps = rows / (recipe.train.global_batch_size * recipe.mixture.tasks_per_step)
    return Epoch(steps, f"an epoch has {steps:,.4g} steps, by the {rows:,} rows in data_dir")


def report_plan(outcome: Outcome, *, output: Path | None = None) -> None:
    """Print a plan, and write it as JSON to `output`."""
    show_plan(outcome.plan, shape=outcome.shape, schedule=outcome.schedule,
              cluster=outcome.cluster, best=outcome.best)  # fmt: skip
    if output is not None:
        body = plan_json(outcome.plan, shape=outcome.shape, schedule=outcome.schedule,
                         cluster=outcome.cluster, best=outcome.best)  # fmt: skip
        output.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
