"""What can be done with a run's latest weights: score them and export them."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dist_ft import dist
from dist_ft.config import Recipe
from dist_ft.data.fingerprint import tokenizer_fingerprint
from dist_ft.data.loader import MicroBatch
from dist_ft.data.manifest import differences
from dist_ft.engine.base import on_device
from dist_ft.engine.loss_module import LossModule
from dist_ft.model.backbone import MultiTaskModel
from dist_ft.model.lora import LoraSettings, merged_lora
from dist_ft.model.sources import resolve_model_path
from dist_ft.tasks.base import Task
from dist_ft.train import analysis
from dist_ft.train.best import Decision
from dist_ft.train.checkpoint import (
    CheckpointReader,
    find_checkpoint,
    known_checkpoints,
    verify_checkpoint,
)
from dist_ft.train.checkpoint_names import checkpoint_name
from dist_ft.train.evaluate import collect, evaluate_task, paired_bootstrap
from dist_ft.train.export import export_task
from dist_ft.train.export_adapter import export_adapter
from dist_ft.train.extensions import NO_EXTENSIONS, Extensions
from dist_ft.train.parts import Parts, eval_data, load_preprocessor, make_model, make_parts
from dist_ft.train.recorder import Recorder, surviving_events
from dist_ft.train.regularization import prepare_model
from dist_ft.train.retention import worst_if_nan
from dist_ft.train.run_folder import RunFolder
from dist_ft.train.run_shards import restored_tasks
from dist_ft.train.weights import load_weights

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
    recipe, parts, folder, reader = open_start(run, extensions=extensions)
    load_weights(parts.model, reader)
    return recipe, parts, folder, reader.trainer["progress"]["step"]


def open_start(
    run: Path, *, extensions: Extensions = NO_EXTENSIONS
) -> tuple[Recipe, Parts, RunFolder, CheckpointReader]:
    """Return recipe, parts as they were before the run, folder and its newest whole checkpoint.

    The data are those of the run, whatever its source has become.

    Raises:
        ValueError: If the folder holds no run or no whole checkpoint, the model's tokenizer is not
            the one that the run was trained with, or its data are gone.
    """
    recipe, folder, reader = _open_folder(run)
    parts = make_parts(recipe, log.info, extensions=extensions, of_run=folder)
    return recipe, parts, folder, reader


def _open_folder(run: Path) -> tuple[Recipe, RunFolder, CheckpointReader]:
    folder = RunFolder(run)
    recipe = Recipe.model_validate(folder.read_recipe())
    path, passed_over = find_checkpoint(folder.checkpoints)
    if path is None:
        raise ValueError(
            f"{run} has no whole checkpoint{': ' + '; '.join(passed_over) if passed_over else ''}: "
            "train it first"
        )
    for text in passed_over:
        log.warning("checkpoint passed over: %s", text)
    reader = CheckpointReader(path)
    _check_tokenizer(recipe, reader)
    return recipe, folder, reader


def _check_tokenizer(recipe: Recipe, reader: CheckpointReader) -> None:
    """Check that the weights still belong to the tokenizer that lies beside the model.

    Raises:
        ValueError: If the token ids would mean something else.
    """
    saved = reader.trainer.get("tokenizer")
    if saved is None:
        return  # checkpoints of the first runs do not say
    changed = differences(saved, tokenizer_fingerprint(load_preprocessor(recipe)))
    if changed:
        raise ValueError(
            f"model.path: the tokenizer of {recipe.model.path} is not the one that "
            f"{reader.folder} was trained with ({'; '.join(changed)}): put that one back"
        )


def analyse(run: Path, *, extensions: Extensions = NO_EXTENSIONS) -> Path:
    """Write what moved, how sure the model is and what it confuses; return the file's path.

    A parameter that an average is kept of gets the average: it was scored in training, too.

    Raises:
        ValueError: If the folder holds no run or no whole checkpoint.
    """
    recipe, parts, folder, reader = open_start(run, extensions=extensions)
    return analysis.analyse(recipe, parts, reader, folder=folder.root)


@dataclass(frozen=True)
class ExportOptions:
    """What is exported.

    Attributes:
        best: Each task's weights at its best evaluation instead of the newest ones.
        lora: Adapters added to the weights, or alone, for peft.
        replace: A folder that an earlier export made gives way to the new one.
    """

    best: bool = False
    lora: Literal["merged", "adapter"] = "merged"
    replace: bool = False


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


Differences = dict[str, dict[str, tuple[float, float, float]]]


def compare(run: Path, against: Path, *, extensions: Extensions = NO_EXTENSIONS) -> Differences:
    """Return by task and metric how much larger it is in `run` than in `against`, with interval.

    Both are scored on their own validation rows, which must be the same.

    Raises:
        ValueError: If a folder holds no run, or the rows are not the same.
    """
    world = dist.World(rank=0, local_rank=0, world_size=1)
    collected: list[dict[str, tuple[Any, Any, list[Any]]]] = []
    for path in (run, against):
        recipe, parts, _, _ = open_finished(path, extensions=extensions)
        forward = _forward(parts)
        of_run: dict[str, tuple[Any, Any, list[Any]]] = {}
        for data in eval_data(recipe, parts, split="validation"):
            metrics, records, _ = collect(data, forward=forward, world=world)
            source = data.dataset.take(np.arange(len(data.dataset)), columns={"source_row"})[
                "source_row"
            ]
            # Numbers alone are those of any set of as many rows.
            about = json.dumps(data.dataset.manifest.source, sort_keys=True)
            of_run[data.task.name] = (metrics, (about, list(source)), records)
        collected.append(of_run)
    ours, theirs = collected
    found: Differences = {}
    for task in ours.keys() & theirs.keys():
        metrics, rows, records = ours[task]
        if rows != theirs[task][1]:
            raise ValueError(
                f"--against: task {task} has other validation rows in {against}: compare runs on "
                "the same data and split"
            )
        found[task] = paired_bootstrap(metrics, records, theirs[task][2], resamples=RESAMPLES)
    if not found:
        raise ValueError(f"--against: {against} has no task of {run}: nothing can be compared")
    return found


def _forward(parts: Parts) -> Any:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    losses = {t.task.name: t.task.loss for t in parts.tasks}
    module = LossModule(parts.model, losses).eval().to(device)

    @torch.no_grad()
    def forward(task: str, batch: MicroBatch) -> tuple[Tensor, Any]:
        return module(task, on_device(batch.inputs, device), on_device(batch.targets, device))

    return forward


def export(
    run: Path,
    *,
    task: str | None = None,
    how: ExportOptions | None = None,
    extensions: Extensions = NO_EXTENSIONS,
) -> list[Path]:
    """Write a plain transformers folder for each task (or the one named); return the folders.

    Labels and weights are those of the run's folder; neither source nor shards are read.

    Raises:
        ValueError: If there is no such task, or an export folder exists that is not to be replaced.
    """
    how = how or ExportOptions()
    recipe, folder, reader = _open_folder(run)
    names = [task.name for task in recipe.tasks]
    if task is not None and task not in names:
        raise ValueError(f"--task: the run has no task {task!r}; its tasks are {', '.join(names)}")
    if how.lora == "adapter" and recipe.model.lora is None:
        raise ValueError("--lora adapter: the run has no model.lora: leave the option out")
    wanted = names if task is None else [task]
    existing = [folder.export / name for name in wanted if (folder.export / name).exists()]
    if existing and not how.replace:
        raise ValueError(
            f"{', '.join(map(str, existing))} exists already: add --replace, or move it away"
        )
    decision = Decision(recipe.evaluation.decide_by, recipe.evaluation.weights)
    tokenizer = load_preprocessor(recipe)
    tasks = restored_tasks(recipe, folder=folder, extensions=extensions)
    model, groups = make_model(recipe, tasks, tokenizer=tokenizer)
    # As in training: what it sets (dropout) is part of the exported configuration.
    prepare_model(recipe, model, groups=groups, trains=[group.name for group in groups])
    exporter = _Exporter(recipe, model, tokenizer, folder, how)
    scored = _deciding_scores(folder.metrics, tasks, decision) if how.best else {}
    folders: list[Path] = []
    for name in wanted:
        if how.best:
            by = decision.name_for(name)
            scores = {step: of_step[by] for step, of_step in scored.items()}
            reader = best_checkpoint(
                folder.checkpoints, name=by, scores=scores, min_delta=_kept_delta(recipe)
            )
        load_weights(model, reader)
        with _out_of_the_way(folder.export / name):
            folders.append(exporter.write(name, step=reader.trainer["progress"]["step"]))
    return folders


@contextmanager
def _out_of_the_way(folder: Path) -> Iterator[None]:
    """Move a folder away while another takes its place; put it back if none does."""
    aside = folder.with_name(f".old-{folder.name}")
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    try:
        yield
    except BaseException:
        if aside.exists():
            aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


@dataclass(frozen=True)
class _Exporter:
    """Writes tasks of a model that has its trained weights."""

    recipe: Recipe
    model: MultiTaskModel
    tokenizer: Any
    folder: RunFolder
    how: ExportOptions

    def write(self, task: str, *, step: int) -> Path:
        """Write a task's folder, whose card tells the scores at `step`; return its path."""
        folder = self.folder.export / task
        lora = self.recipe.model.lora
        card: dict[str, Any] = {
            "metrics": last_scores(self.folder.metrics, step=step).get(task, {}),
            "recipe": self.recipe.model_dump(mode="json", exclude={"output_dir", "data_dir"}),
        }
        if self.how.lora == "adapter":
            assert lora is not None
            return export_adapter(
                self.model,
                self.tokenizer,
                task=task,
                folder=folder,
                settings=LoraSettings(**lora.model_dump()),
                card={
                    **card,
                    "base_model": resolve_model_path(self.recipe.model.path),
                    "revision": self.recipe.model.revision,
                },
            )
        with merged_lora(self.model):
            return export_task(self.model, self.tokenizer, task=task, folder=folder, card=card)


def best_checkpoint(
    root: Path, *, name: str, scores: Mapping[int, float], min_delta: float = 0.0
) -> CheckpointReader:
    """Return the whole checkpoint with the best deciding score `name`, the earliest of equals.

    Args:
        root: The run's checkpoints.
        name: Of the score.
        scores: Those of all evaluations by step, larger is better, none of them NaN.
        min_delta: What one without a checkpoint may be better by.

    Raises:
        ValueError: If no whole checkpoint was saved at an evaluation, or that of the best is gone.
    """
    known = known_checkpoints(root)
    # What checkpoints say of themselves comes second: how scores decide may change at a resume.
    saved = {kept.step: kept.scores[name] for kept in known if name in kept.scores}
    saved.update(scores)
    scored = sorted(
        (kept for kept in known if kept.step in saved),
        key=lambda kept: (-saved[kept.step], kept.step),
    )
    for kept in scored:
        folder = root / checkpoint_name(kept.step)
        damage = verify_checkpoint(folder)
        if damage is None:
            gone = {step: s for step, s in scores.items() if step not in {k.step for k in known}}
            best = max(gone, key=lambda step: (gone[step], -step), default=kept.step)
            if gone.get(best, -math.inf) > saved[kept.step] + min_delta:
                raise ValueError(
                    f"--best: {name} was best at step {best}, and {root} has no checkpoint of it; "
                    f"the best that is left is of step {kept.step}: train with "
                    "checkpoint.keep_best=true, or leave the option out"
                )
            return CheckpointReader(folder)
        log.warning("checkpoint passed over: %s: %s", folder.name, damage)
    raise ValueError(
        f"--best: {root} has no whole checkpoint with a score of {name}: train with "
        "evaluation.every and checkpoint.keep_best=true"
    )


def _kept_delta(recipe: Recipe) -> float:
    """Return how much better a score must be than the best for `keep_best` to save it."""
    stopping = recipe.evaluation.early_stopping
    return stopping.min_delta if stopping and recipe.checkpoint.keep_best else 0.0


def _deciding_scores(
    metrics: Path, tasks: Sequence[Task], decision: Decision
) -> dict[int, dict[str, float]]:
    """Return the deciding scores of each step at which all tasks were scored."""
    metric_of = {task.name: task.primary_metric for task in tasks}
    found: dict[int, dict[str, float]] = {}
    for event in surviving_events(metrics):
        if event["event"] == "eval" and event["split"] == "validation":
            metric, larger_is_better = metric_of.get(event["task"], ("", True))
            if (value := event["metrics"].get(metric)) is not None:
                score = worst_if_nan(value if larger_is_better else -value)
                found.setdefault(event["step"], {})[event["task"]] = score
    return {s: decision.scores(of) for s, of in found.items() if len(of) == len(metric_of)}


def last_scores(metrics: Path, *, step: int) -> Mapping[str, dict[str, float]]:
    """Return the validation metrics of each task of the weights of step `step`; of no others."""
    return {
        e["task"]: e["metrics"]
        for e in surviving_events(metrics)
        if e["event"] == "eval" and e["split"] == "validation" and e["step"] == step
    }
