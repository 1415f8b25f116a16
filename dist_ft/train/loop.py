"""The training loop: the only one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypedDict

import torch

from dist_ft.data.joined import JoinedLoader
from dist_ft.data.loader import StepBatch, StepLoader
from dist_ft.engine.base import Engine, PhaseReport, StepResult
from dist_ft.freezing.policies import FreezePolicy
from dist_ft.freezing.schedule import Phase
from dist_ft.optim.balancing import Balancer
from dist_ft.train.agreement import StepPlan, agree


class Best(TypedDict):
    """The best of a deciding score: its value, its step, and evaluations since without better."""

    score: float
    step: int
    stale: int


class Unscored(TypedDict):
    """A step whose evaluation was broken off by a stop: its task, and its loss if it had one."""

    task: str
    loss: float | None


@dataclass
class Progress:
    """How far a run has come: everything that is not in the engine.

    Attributes:
        step: Optimizer steps done.
        tokens: Useful tokens seen, over all ranks.
        phase: Index of the phase of the last step; -1 before the first.
        thawed_at: Step at which each trainable layer group began to train.
        refused: Steps in a row, up to the last one, whose update was left out.
        dropped: Steps [first, end) whose data were given up when the run was rolled back.
        losses: Latest losses of each task, if leaps are looked for.
        best: Best deciding scores so far.
        ended: Whether the run was ended because it got no better.
        unscored: The last step, if a stop broke its evaluation off: it is done after the resume.
    """

    step: int = 0
    tokens: int = 0
    phase: int = -1
    thawed_at: dict[str, int] = field(default_factory=dict)
    refused: int = 0
    dropped: list[list[int]] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    best: dict[str, Best] = field(default_factory=dict)
    ended: bool = False
    unscored: Unscored | None = None


class Callback(Protocol):
    """Something that watches the run; called on every rank, in order."""

    def on_fit_start(self, run: Run) -> None:
        """Before the first step of this process."""
        ...

    def on_phase(self, run: Run, phase: Phase, report: PhaseReport) -> None:
        """After what trains has changed."""
        ...

    def on_step_end(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        """After every optimizer step; `run.progress` counts it already."""
        ...

    def on_scores(self, run: Run) -> None:
        """After an evaluation of the weights of `run.progress.step`, before `on_step_end`."""
        ...

    def on_fit_end(self, run: Run) -> None:
        """After the last step, also when the run was asked to stop."""
        ...


def nobody_replans(run: Run, result: StepResult) -> bool:
    """Return that a refused step is not done again.

    Raises:
        OutOfMemoryError: If that is for want of memory: such a step says nothing of its numbers.
    """
    del run
    if result.lacked_memory is not None:
        raise torch.OutOfMemoryError(result.lacked_memory)
    return False


@dataclass
class Run:
    """The parts of a run, put together by ``build``.

    Attributes:
        engine: Executes steps and phase changes.
        loader: Step to micro-batches.
        policy: Step to phase.
        learning_rates: (step, thawed_at) to the learning rate of each layer group.
        trainable_now: Reads the layer groups that require a gradient from the parameters.
        total_steps: Length of the run.
        callbacks: Watchers, in order.
        stop_signal: Returns the signal that asked this rank to stop, or 0.
        beat: Tells who watches this rank which section it enters.
        loss_limit: Returns the largest loss of a task that is believed.
        replan: Returns whether a refused step is done again, in smaller micro-batches.
        progress: How far the run has come.
        discard: Deletes what only this run has a use for, once it is over.
        stopped_by: The signal that ended the loop before its time, or 0.
        balancer: Decides what the tasks' losses weigh, unless the recipe fixes that.
        busy_s: Seconds spent in steps: waiting for data, and computing.
    """

    engine: Engine
    loader: StepLoader | JoinedLoader
    policy: FreezePolicy
    learning_rates: Callable[[int, Mapping[str, int]], dict[str, float]]
    trainable_now: Callable[[], tuple[str, ...]]
    total_steps: int
    callbacks: Sequence[Callback] = ()
    stop_signal: Callable[[], int] = lambda: 0
    beat: Callable[[str], None] = lambda section: None  # noqa: ARG005 - nobody watches
    loss_limit: Callable[[str], float] = lambda task: math.inf  # noqa: ARG005 - any
    replan: Callable[[Run, StepResult], bool] = nobody_replans
    progress: Progress = field(default_factory=Progress)
    discard: Callable[[], None] = lambda: None
    balancer: Balancer | None = None
    stopped_by: int = 0
    busy_s: float = 0.0

    @property
    def is_over(self) -> bool:
        """Whether the last step is done: that of the recipe, or where it stopped early."""
        return self.progress.ended or self.progress.step >= self.total_steps

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps besides the engine's state, as JSON."""
        return {
            "progress": asdict(self.progress),
            "data": self.loader.state_dict(self.progress.step),
            "policy": self.policy.state_dict(),
            "balancing": None if self.balancer is None else self.balancer.state_dict(),
        }


def fit(run: Run) -> Run:
    """Train until the last step or until a rank is asked to stop; return the run."""
    for callback in run.callbacks:
        callback.on_fit_start(run)
    while not take_steps(run):
        pass  # the loader reads the next step in other micro-batches
    for callback in run.callbacks:
        callback.on_fit_end(run)
    return run


def take_steps(run: Run) -> bool:
    """Train until the run ends or is stopped; return False if a step is to be planned anew."""
    with closing(run.loader.iterate(run.progress.step)) as batches:
        while not (run.is_over or run.stopped_by):
            run.beat("data")
            batch = next(batches)
            phase = run.policy.phase_at(batch.step)
            run.beat("agreement")
            run.stopped_by = agree(plan_of(run, batch, phase), stop=run.stop_signal())
            if run.stopped_by:
                break
            if phase.index != run.progress.phase:
                run.beat("phase change")
                enter_phase(run, phase)
            run.beat("step")
            began = time.monotonic()
            result = run.engine.train_step(
                batch.step,
                task=batch.task,
                micro_batches=batch.micro_batches,
                global_count=batch.global_count,
                learning_rates=run.learning_rates(batch.step, run.progress.thawed_at),
                loss_limit=loss_limit(run, batch),
                joined=batch.joined,
            )
            if result.refused is not None and run.replan(run, result):
                return False
            waited = sum(turn.data_wait_s for turn in batch.turns)
            run.busy_s += time.monotonic() - began + waited
            run.progress.step += 1
            run.progress.tokens += sum(turn.global_tokens for turn in batch.turns)
            for callback in run.callbacks:
                callback.on_step_end(run, batch, result)
    return True


def loss_limit(run: Run, batch: StepBatch) -> float:
    """Return the largest loss of a step that is believed: the mean of its turns' limits."""
    return sum(run.loss_limit(turn.task) for turn in batch.turns) / len(batch.turns)


def plan_of(run: Run, batch: StepBatch, phase: Phase) -> StepPlan:
    """Return what this rank is about to do, for the others to compare before it is done."""
    return StepPlan(
        step=batch.step,
        task="+".join(turn.task for turn in batch.turns),
        micro_batches=sum(len(turn.micro_batches) for turn in batch.turns),
        phase=phase.index,
        trainable=phase.trainable,
        trainable_before=run.trainable_now(),
    )


def enter_phase(run: Run, phase: Phase) -> None:
    """Train the phase's layer groups from now on and tell the callbacks.

    Raises:
        RuntimeError: If the change has no memory: smaller micro-batches would not help it.
    """
    try:
        report = run.engine.set_trainable(phase.trainable)
    except torch.OutOfMemoryError as error:
        why = str(error).splitlines()[0]
        raise RuntimeError(
            f"step {run.progress.step}: no memory to change to phase {phase.index} ({why}), for "
            "which weights and optimizer state lie there twice: raise engine.zero_stage, set "
            "engine.offload_optimizer: true, or freezing.switch: in_place"
        ) from error
    kept = run.progress.thawed_at
    run.progress.thawed_at = {g: kept.get(g, run.progress.step) for g in phase.trainable}
    run.progress.phase = phase.index
    for callback in run.callbacks:
        callback.on_phase(run, phase, report)
