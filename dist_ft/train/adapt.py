"""Watches the layer groups and lets a measuring freeze policy decide, once for all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dist_ft import dist
from dist_ft.data.loader import MicroBatch, StepBatch
from dist_ft.engine.base import Engine, PhaseReport, StepResult
from dist_ft.freezing.adaptive import MeasuredPolicy, PlateauPolicy, SettledPolicy
from dist_ft.freezing.schedule import Phase
from dist_ft.freezing.similarity import alignment, gram
from dist_ft.train.callbacks import Evaluate, Watcher
from dist_ft.train.loop import Run
from dist_ft.train.recorder import Recorder

Measure = Callable[[Run], dict[str, float]]
SMALLER_IS_BETTER = {"loss", "perplexity", "mse", "mae"}


@dataclass
class WatchGroups(Watcher):
    """Writes a ``groups`` event: gradient norm and drift of every layer group.

    The gradient norm is that of Adam's first moment, the running mean of the gradient, because it
    is there in every ZeRO stage. The drift is the L2 distance of the weights from those at the
    start of this process, relative to their norm; each rank compares its own share.
    """

    recorder: Recorder
    every: int
    layer_group_of: Mapping[str, str]
    _start: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def on_phase(self, run: Run, phase: Phase, report: PhaseReport) -> None:
        """Remember this rank's share of the weights in host memory, at the first phase."""
        if not self._start:
            self._remember(run)

    def on_fit_start(self, run: Run) -> None:
        """Remember the weights of a resumed run, whose phase is set already."""
        if run.progress.phase >= 0:
            self._remember(run)

    def _remember(self, run: Run) -> None:
        for piece in _weight_slices(run.engine):
            self._start[piece[0], piece[1]] = piece[2].detach().to("cpu", copy=True)

    def on_step_end(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        """Measure when the interval ends."""
        if run.progress.step % self.every == 0 or run.progress.step == run.total_steps:
            norms, drifts = run.engine.moment_norms(), self._drifts(run.engine)
            self.recorder.event(
                "groups",
                step=run.progress.step,
                gradient_norm={name: norms.get(name, 0.0) for name in drifts},
                drift=drifts,
            )

    def _drifts(self, engine: Engine) -> dict[str, float]:
        names = list(dict.fromkeys(self.layer_group_of.values()))
        moved, total = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        for parameter, start, weight in _weight_slices(engine):
            group = self.layer_group_of[parameter]
            before = self._start[parameter, start].float()
            moved[group] += float((weight.detach().cpu().float() - before).square().sum())
            total[group] += float(before.square().sum())
        sums = dist.all_reduce_sum([*moved.values(), *total.values()])
        return {
            name: (sums[i] / max(sums[i + len(names)], 1e-30)) ** 0.5
            for i, name in enumerate(names)
        }


def _weight_slices(engine: Engine) -> list[tuple[str, int, Tensor]]:
    return [
        (s.parameter, s.start, s.values["weight"])
        for s in engine.state().slices
        if "weight" in s.values
    ]


@dataclass
class DecideByScore(Watcher):
    """Shows a plateau policy every new validation score.

    Attributes:
        policy: Decides.
        evaluate: Holds the latest scores.
        score: Turns them into one number, larger is better.
    """

    policy: PlateauPolicy
    evaluate: Evaluate
    score: Callable[[Evaluate], float]

    def on_scores(self, run: Run) -> None:
        """Decide."""
        self.policy.observe_score(run.progress.step, self.score(self.evaluate))
        share_decision(self.policy)


@dataclass
class DecideByMeasurement(Watcher):
    """Shows an adaptive policy a measurement of the blocks at every interval."""

    policy: SettledPolicy
    measure: Measure
    every: int

    def on_step_end(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        """Measure and decide when the interval ends."""
        if run.progress.step % self.every == 0:
            self.policy.observe(run.progress.step, self.measure(run))
            share_decision(self.policy)


def share_decision(policy: MeasuredPolicy) -> None:
    """Give every rank rank 0's decision: it is taken once, whatever the others computed."""
    policy.load_state_dict(dist.broadcast_object(policy.state_dict()))


def gradient_norms(run: Run) -> dict[str, float]:
    """Return the gradient norm of every layer group that has stepped."""
    return run.engine.moment_norms()


@dataclass
class RepresentationChange:
    """Measures how much each block's output on fixed rows has changed since the last time.

    One minus the linear CKA (Kornblith et al. 2019) of the outputs, averaged over positions, now
    and at the last measurement: 0 means that the block's representation has not changed. Egeria
    compares with a reference model that it keeps updating; the last measurement takes its place
    and costs one forward.

    Attributes:
        blocks: The module of each block's layer group.
        batch: The task and micro-batch whose rows are watched; the same on every rank.
        policy: Keeps the Gram matrices of the last measurement, so that a checkpoint has them.
    """

    blocks: Mapping[str, nn.Module]
    batch: tuple[str, MicroBatch]
    policy: SettledPolicy

    def __call__(self, run: Run) -> dict[str, float]:
        """Return the change of every block; empty at the first call."""
        outputs: dict[str, Tensor] = {}
        handles = [
            module.register_forward_hook(_keep(outputs, name))
            for name, module in self.blocks.items()
        ]
        try:
            run.engine.eval_forward(*self.batch)
        finally:
            for handle in handles:
                handle.remove()
        now = {name: gram(output).flatten().tolist() for name, output in outputs.items()}
        before, self.policy.decisions.grams = self.policy.decisions.grams, now
        return {name: 1.0 - alignment(before[name], now[name]) for name in now if name in before}


def _keep(into: dict[str, Tensor], name: str) -> Callable[[nn.Module, object, object], None]:
    def hook(_module: nn.Module, _inputs: object, output: object) -> None:
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        assert isinstance(hidden, torch.Tensor)
        into[name] = hidden.detach().float().mean(dim=1).cpu()

    return hook


def mean_score(evaluate: Evaluate, *, tasks: Sequence[str], metric: str | None) -> float:
    """Return the mean of the tasks' deciding metrics, each oriented so that larger is better."""
    values: list[float] = []
    for data in evaluate.data:
        if data.task.name in tasks:
            name, larger_is_better = data.task.primary_metric
            if metric is not None:
                name, larger_is_better = metric, metric not in SMALLER_IS_BETTER
            value = evaluate.last[data.task.name].metrics[name]
            values.append(value if larger_is_better else -value)
    return sum(values) / len(values)
