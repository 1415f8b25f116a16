"""The command ``dist-ft plan``: from a recipe to its plan."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dist_ft.config import Recipe
from dist_ft.planning.cost import Cluster
from dist_ft.planning.hardware import find_hardware
from dist_ft.planning.meta import read_shape
from dist_ft.planning.phases import Schedule, schedule_of
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
        epoch_steps: Optimizer steps of an epoch, if the user knows them.
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
    schedule = schedule_of(recipe, shape, epoch_steps=request.epoch_steps)
    setting = setting_of(recipe, schedule, world_size=cluster.world_size)
    plan = make_plan(shape, schedule=schedule, setting=setting, cluster=cluster)
    best = cheapest(shape, schedule=schedule, setting=setting, cluster=cluster)
    return Outcome(plan, best, shape, schedule, cluster)


def report_plan(outcome: Outcome, *, output: Path | None = None) -> None:
    """Print a plan, and write it as JSON to `output`."""
    show_plan(outcome.plan, shape=outcome.shape, schedule=outcome.schedule,
              cluster=outcome.cluster, best=outcome.best)  # fmt: skip
    if output is not None:
        body = plan_json(outcome.plan, shape=outcome.shape, schedule=outcome.schedule,
                         cluster=outcome.cluster, best=outcome.best)  # fmt: skip
        output.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
