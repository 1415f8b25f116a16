"""dist_ft on the peers' jobs: bf16 under ZeRO-2, everything else as it comes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from benchmarks.training.workload import (
    MAX_LENGTH,
    RANKS,
    WEIGHT_DECAY,
    Clock,
    Job,
    Outcome,
    Score,
)
from dist_ft.data.loader import StepBatch
from dist_ft.dist import World
from dist_ft.engine.base import StepResult
from dist_ft.engine.heap import keep_freed_memory
from dist_ft.recipe import load_recipe
from dist_ft.train.build import make_run
from dist_ft.train.callbacks import Checkpoint, Evaluate, Watcher
from dist_ft.train.console import Console
from dist_ft.train.loop import Run, fit
from dist_ft.train.parts import make_parts
from dist_ft.train.recorder import Recorder
from dist_ft.train.run_folder import RunFolder

TASK = "text"


def write_recipe(
    job: Job, *, name: str, freezing: dict[str, Any] | None = None, **sections: Any
) -> Path:
    """Write the job as a recipe and return where it is.

    Args:
        job: The job; its depth is a static freeze unless `freezing` says otherwise.
        name: Of the run.
        freezing: Section of that name.
        sections: Others, which replace ours.
    """
    if freezing is None:
        static = {"policy": "static", "depth": job.depth}
        freezing = static if job.depth else {"policy": "none"}
    files = {s: str(job.folder / f"{s}.jsonl") for s in ("train", "validation")}
    recipe: dict[str, Any] = {
        "name": name,
        "seed": job.seed,
        "output_dir": str(job.folder / "runs"),
        "data_dir": str(job.folder / "shards"),
        "model": {"path": job.model},
        "tasks": [
            {"name": TASK, "type": "text_classification", "max_length": MAX_LENGTH, "data": files}
        ],
        "freezing": freezing,
        "optim": {"lr": job.lr, "weight_decay": WEIGHT_DECAY},
        "engine": {"zero_stage": 2, "precision": "bf16"},
        "train": {
            "max_duration": f"{job.epochs}ep",
            "global_batch_size": RANKS * job.micro_batch,
            "micro_batch_size": job.micro_batch,
        },
        **sections,
    }
    path = job.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def prepare_shards(recipe: Path) -> None:
    """Tokenize a recipe's rows: before the clock starts, as the peers' are."""
    make_parts(load_recipe(recipe), lambda _: None)


def open_run(path: Path, *, folder: Path) -> Run:
    """Return the run of a recipe on this rank, made anew; the process group must be up."""
    recipe = load_recipe(path)
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    return make_run(
        recipe,
        make_parts(recipe, lambda _: None),
        folder=RunFolder(folder),
        world=World(rank, rank, dist.get_world_size()),
        device=torch.device("cpu"),
        console=Console(main=False),
        recorder=Recorder(None),
    )


def train_own(job: Job, recipe: Path) -> Outcome:
    """Return what the run took, its engine's construction and its phase changes included."""
    keep_freed_memory()  # as `dist-ft train` does
    run = open_run(recipe, folder=job.folder / "runs" / recipe.stem)
    evaluate = next(c for c in run.callbacks if isinstance(c, Evaluate))

    def score() -> Score:
        evaluate.evaluate(run)
        metrics = evaluate.last[TASK].metrics
        return Score(metrics["loss"], metrics["accuracy"])

    clock = Clock(score, every=job.score_every)
    # The peers save nothing either, and the clock says when to score.
    others = [c for c in run.callbacks if not isinstance(c, Evaluate | Checkpoint)]
    run.callbacks = [*others, _Timed(clock)]
    fit(run)
    run.discard()
    return clock.outcome()


@dataclass
class _Timed(Watcher):
    """Starts the clock before the engine is built for the first phase."""

    clock: Clock

    def on_fit_start(self, run: Run) -> None:
        """Start."""
        del run
        self.clock.start()

    def on_step_end(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        """Count an optimizer step."""
        del batch, result
        self.clock.step_ended(is_last=run.progress.step == run.total_steps)
