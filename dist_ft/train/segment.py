"""Trains a run in segments: up to a step that is not its last, and later on from there."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from dist_ft import dist
from dist_ft.config import Recipe
from dist_ft.config_evaluation import EvaluationConfig
from dist_ft.heartbeat import Heartbeat
from dist_ft.train.adapt import mean_score
from dist_ft.train.beats import make_beat
from dist_ft.train.best import Decision
from dist_ft.train.build import make_run
from dist_ft.train.callbacks import Evaluate
from dist_ft.train.console import Console
from dist_ft.train.ending import checkpoint_of, train_to_end
from dist_ft.train.environment import environment
from dist_ft.train.loop import Run
from dist_ft.train.memory import FitMemory, fit_memory
from dist_ft.train.numbers import BadNumbersError
from dist_ft.train.parts import make_parts
from dist_ft.train.recorder import Recorder
from dist_ft.train.restoring import restore
from dist_ft.train.run_data import keep_data
from dist_ft.train.run_folder import RunFolder
from dist_ft.train.run_lock import RunLock
from dist_ft.train.shared_folder import check_same_data


class PreemptedError(Exception):
    """The run was asked to stop; it has saved and can go on."""


@dataclass(frozen=True)
class Place:
    """Where segments are trained.

    Attributes:
        world: This rank's place; the process group must be up.
        device: This rank's device.
        stop_signal: Returns the signal that asked this rank to stop, or 0.
        heartbeat: Tells the launcher that this rank is alive.
    """

    world: dist.World
    device: torch.device
    stop_signal: Callable[[], int] = lambda: 0
    heartbeat: Heartbeat = field(default_factory=lambda: Heartbeat(None))

    def between_runs(self) -> None:
        """Say that this rank prepares a run or compares runs, for as long as that takes."""
        self.heartbeat.beat("between runs", step=0, phase=-1, timeout_s=math.inf)


@dataclass(frozen=True)
class Segment:
    """What a run has come to at the end of a segment; the same on every rank.

    Attributes:
        score: What the tasks' deciding metrics on validation come to by evaluation.decide_by,
            their mean for ``each``; larger is better.
        metrics: All validation metrics by task.
        seconds: Wall time of this segment, with everything that it took to begin and score it.
    """

    score: float
    metrics: dict[str, dict[str, float]]
    seconds: float


def train_until(recipe: Recipe, *, step: int, place: Place) -> Segment:
    """Train a run up to `step`, from its newest checkpoint if it has one; score it and save it.

    Everything but the end is as in a whole run: learning rates and phases follow the whole
    length, so that segments in a row come to the same weights as one run, bit for bit.

    Args:
        recipe: Of the whole run.
        step: Optimizer steps at the end of the segment.
        place: Where to train.

    Raises:
        ValueError: If the run's folder belongs to another recipe, or another process writes it.
        PreemptedError: If a rank was asked to stop.
        BadNumbersError: On every rank, if the run's numbers stay bad.
        ReplannedError: If the ranks must start again, with smaller micro-batches.
    """
    began = time.monotonic()
    folder = RunFolder(recipe.output_dir / recipe.name)
    lock = RunLock(folder.root)

    def open_folder() -> None:
        lock.acquire()
        folder.start(recipe.model_dump(mode="json"), resume=True)
        folder.write_json("env.json", environment(place.world, place.device))

    with ExitStack() as at_end:
        at_end.callback(lock.release)
        at_end.callback(place.between_runs)
        dist.on_main(open_folder)
        recorder = Recorder(folder.metrics if place.world.is_main else None)
        at_end.callback(recorder.close)
        run, memory = _make(recipe, place=place, folder=folder, recorder=recorder)
        at_end.callback(checkpoint_of(run).writer.close)
        # Only the loop and what happens at its end read this; the learning rates have their own.
        is_last, run.total_steps = step == run.total_steps, step
        _fit(run, memory)
        if run.stopped_by:
            recorder.event("stop", step=run.progress.step, signal=run.stopped_by)
            raise PreemptedError
        recorder.event("end" if is_last else "segment", step=step)
        segment = _segment(run, recipe.evaluation, seconds=time.monotonic() - began)
        if is_last:  # until then the next segment must find what it would as part of one run
            run.discard()
        run.engine.close()
        return segment


def _make(
    recipe: Recipe, *, place: Place, folder: RunFolder, recorder: Recorder
) -> tuple[Run, FitMemory]:
    """Return the whole run, as far as it has come, and what fits it into memory."""
    console = Console(main=False)
    parts = make_parts(recipe, console.say)
    check_same_data(parts.tasks, data_dir=recipe.data_dir)
    dist.on_main(lambda: keep_data(folder, recipe, parts.tasks))
    memory = fit_memory(recipe, parts, folder=folder, recorder=recorder, console=console)
    run = make_run(memory.resume(recipe), parts, folder=folder, world=place.world,
                   device=place.device, console=console, recorder=recorder)  # fmt: skip
    run.replan = memory.replan
    run.beat = make_beat(recipe, run, place.heartbeat)
    run.beat("start")
    restore(run, folder=folder, recorder=recorder, console=console)
    run.stop_signal = place.stop_signal
    return run, memory


def _fit(run: Run, memory: FitMemory) -> None:
    """Train; if the numbers stay bad, make room for the next run before that is raised."""
    try:
        train_to_end(run, memory)
    except BadNumbersError:  # raised by every rank, after the same step
        run.discard()
        run.engine.close()
        raise


def _segment(run: Run, config: EvaluationConfig, *, seconds: float) -> Segment:
    evaluate = next(c for c in run.callbacks if isinstance(c, Evaluate))
    tasks = [data.task.name for data in evaluate.data]
    scores = {task: mean_score(evaluate, tasks=[task], metric=None) for task in tasks}
    score = one_score(scores, config)
    metrics = {task: dict(evaluate.last[task].metrics) for task in tasks}
    return dist.broadcast_object(Segment(score, metrics, seconds))


def one_score(of_tasks: Mapping[str, float], config: EvaluationConfig) -> float:
    """Return the score by which runs are compared: the run's own, or the mean for ``each``."""
    if any(map(math.isnan, of_tasks.values())):
        return math.nan  # a minimum would depend on the order of the tasks
    by = "mean" if config.decide_by == "each" else config.decide_by
    decision = Decision(by, config.weights)
    return decision.scores(of_tasks)[decision.name]
