"""What can be done with a run's latest weights: score them and export them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_ft import dist
from dist_ft.config import Recipe
from dist_ft.data.loader import MicroBatch
from dist_ft.engine.base import on_device
from dist_ft.engine.loss_module import LossModule
from dist_ft.model.backbone import MultiTaskModel
from dist_ft.train.checkpoint import CheckpointReader, find_checkpoint
from dist_ft.train.evaluate import evaluate_task
from dist_ft.train.export import export_task
from dist_ft.train.extensions import NO_EXTENSIONS, Extensions
from dist_ft.train.parts import Parts, eval_data, make_parts
from dist_ft.train.recorder import Recorder, surviving_events
from dist_ft.train.run_folder import RunFolder

log = logging.getLogger("dist_ft")

SPLITS = ("validation", "test")
RESAMPLES = 200  # of the rows, for the confidence intervals


def open_finished(
    run: Path, *, extensions: Extensions = NO_EXTENSIONS
) -> tuple[Recipe, Parts, RunFolder, int]:
    """Return recipe, parts with the newest whole checkpoint's weights, folder and its step.

    Raises:
        ValueError: If the folder holds no run or no whole checkpoint.
    """
    folder = RunFolder(run)
    recipe = Recipe.model_validate(folder.read_recipe())
    path, passed_over = find_checkpoint(folder.checkpoints)
    if path is None:
        raise ValueError(
            f"{run} has no whole checkpoint{': ' + '; '.join(passed_over) if passed_over else ''}: "
            "train it first"
        )
    parts = make_parts(recipe, log.info, extensions=extensions)
    for text in passed_over:
        log.warning("checkpoint passed over: %s", text)
    reader = CheckpointReader(path)
    load_weights(parts.model, reader)
    return recipe, parts, folder, reader.trainer["progress"]["step"]


@torch.no_grad()
def load_weights(model: MultiTaskModel, reader: CheckpointReader) -> None:
    """Put a checkpoint's weights into a whole model, in the precision that was trained.

    A parameter that an average is kept of gets the average: it was scored in training, too.

    Raises:
        ValueError: If the checkpoint lacks a parameter.
    """
    for name, parameter in model.named_parameters():
        weight = reader.read("weight", name, start=0, length=parameter.numel())
        if weight is None:
            raise ValueError(f"{reader.folder} has no weights for {name}: it is another model's")
        average = reader.read("average", name, start=0, length=parameter.numel())
        chosen = weight if average is None else average.to(weight.dtype)
        parameter.data = chosen.view(parameter.shape).clone()


def evaluate(
    run: Path, *, extensions: Extensions = NO_EXTENSIONS
) -> dict[str, dict[str, dict[str, float]]]:
    """Return metrics by task and split of a run's newest checkpoint, and record them.

    Raises:
        ValueError: If the folder holds no run or no whole checkpoint.
    """
    recipe, parts, folder, step = open_finished(run, extensions=extensions)
    forward = _forward(parts)
    world = dist.World(rank=0, local_rank=0, world_size=1)
    results: dict[str, dict[str, dict[str, float]]] = {}
    recorder = Recorder(folder.metrics)
    for split in SPLITS:
        for data in eval_data(recipe, parts, split=split):
            scores = evaluate_task(data, forward=forward, world=world, resamples=RESAMPLES)
            results.setdefault(scores.task, {})[split] = scores.metrics
            recorder.event(
                "eval",
                step=step,
                task=scores.task,
                split=split,
                metrics=scores.metrics,
                rows=scores.rows,
                intervals=scores.intervals,
            )
    recorder.close()
    return results


def _forward(parts: Parts) -> Any:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    losses = {t.task.name: t.task.loss for t in parts.tasks}
    module = LossModule(parts.model, losses).eval().to(device)

    @torch.no_grad()
    def forward(task: str, batch: MicroBatch) -> tuple[Tensor, Any]:
        return module(task, on_device(batch.inputs, device), on_device(batch.targets, device))

    return forward


def export(
    run: Path, *, task: str | None = None, extensions: Extensions = NO_EXTENSIONS
) -> list[Path]:
    """Write a plain transformers folder for each task (or the one named); return the folders.

    Raises:
        ValueError: If there is no such task, or an export folder exists already.
    """
    recipe, parts, folder, step = open_finished(run, extensions=extensions)
    names = [t.task.name for t in parts.tasks]
    if task is not None and task not in names:
        raise ValueError(f"--task: the run has no task {task!r}; its tasks are {', '.join(names)}")
    wanted = names if task is None else [task]
    existing = [folder.export / name for name in wanted if (folder.export / name).exists()]
    if existing:
        raise ValueError(
            f"{', '.join(map(str, existing))} exists already: remove it, or move it away"
        )
    scores = last_scores(folder.metrics, step=step)
    return [
        export_task(
            parts.model,
            parts.tokenizer,
            task=name,
            folder=folder.export / name,
            card={
                "metrics": scores.get(name, {}),
                "recipe": recipe.model_dump(mode="json", exclude={"output_dir", "data_dir"}),
            },
        )
        for name in wanted
    ]


def last_scores(metrics: Path, *, step: int) -> Mapping[str, dict[str, float]]:
    """Return the latest validation metrics of each task up to step `step`, that of the weights."""
    return {
        e["task"]: e["metrics"]
        for e in surviving_events(metrics)
        if e["event"] == "eval" and e["split"] == "validation" and e["step"] <= step
    }
