"""What the loss of each task weighs while it trains, decided step by step.

Every decision is made from numbers that are the same on all ranks, and what is learnt is a few
floats that every rank holds: nothing of it is partitioned. A balancer weighs the losses of a step
by what it learnt from the steps before, so the weights are known before the first forward.

Gradient surgery (PCGrad, Yu et al. 2020) is not here: it needs the whole gradient of each task at
once, which ZeRO-2 and 3 never hold, and Kurin et al. 2022 find no gain over tuned fixed weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Observation:
    """What a step has shown of a task.

    Attributes:
        loss: Global mean loss, without the task's weight.
        norm: Global L2 norm of its gradient in the shared matrices, without the task's weight;
            None where that was not measured.
    """

    loss: float
    norm: float | None = None


class Balancer(Protocol):
    """Decides what each task's loss weighs."""

    @property
    def weights(self) -> Mapping[str, float]:
        """What each task's loss weighs in the next step."""
        ...

    def observe(self, seen: Mapping[str, Observation]) -> None:
        """Learn from a step; `seen` has the tasks that it trained."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what was learnt, as JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was learnt."""
        ...


@dataclass
class _Adam:
    """Adam (Kingma and Ba 2015) on a few named floats, each with a step count of its own."""

    lr: float
    moments: dict[str, list[float]] = field(default_factory=dict)

    def step(self, values: dict[str, float], gradients: Mapping[str, float]) -> None:
        for name, gradient in gradients.items():
            first, second, count = self.moments.get(name, (0.0, 0.0, 0))
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            count += 1
            self.moments[name] = [first, second, count]
            scale = math.sqrt(second / (1 - 0.999**count)) + 1e-8
            values[name] -= self.lr * first / (1 - 0.9**count) / scale


class UncertaintyWeights:
    """Weights by homoscedastic uncertainty (Kendall, Gal and Cipolla 2018, section 3.2).

    A task's part of the objective is ``exp(-s) * loss + s / 2``, with s the logarithm of a variance
    that is learnt along with the model. (A regression's extra half of the paper only moves its s.)
    """

    def __init__(self, tasks: Sequence[str], *, lr: float) -> None:
        """Begin with weights of 1; `lr` is that of s, whose optimizer is Adam."""
        self._logs = dict.fromkeys(tasks, 0.0)
        self._adam = _Adam(lr)

    @property
    def weights(self) -> dict[str, float]:
        """What each task's loss weighs."""
        return {task: math.exp(-s) for task, s in self._logs.items()}

    def observe(self, seen: Mapping[str, Observation]) -> None:
        """Move s along its gradient, for the tasks of the step."""
        gradients = {t: 0.5 - math.exp(-self._logs[t]) * o.loss for t, o in seen.items()}
        self._adam.step(self._logs, gradients)

    def state_dict(self) -> dict[str, Any]:
        """Return what was learnt, as JSON."""
        return {"logs": dict(self._logs), "moments": dict(self._adam.moments)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was learnt."""
        self._logs, self._adam.moments = dict(state["logs"]), dict(state["moments"])


class DynamicWeightAverage:
    """Dynamic weight average (Liu, Johns and Davison 2019, section 3.2).

    A task whose loss falls slowly gets more: the weights are the number of tasks times the softmax
    of the ratio of its mean losses over the last two intervals (the paper's epochs), divided by a
    temperature. Until there are two intervals all weigh 1.
    """

    def __init__(self, tasks: Sequence[str], *, every: int, temperature: float) -> None:
        """Begin with weights of 1; an interval has `every` steps."""
        self._every = every
        self._temperature = temperature
        self._weights = dict.fromkeys(tasks, 1.0)
        self._sums = {task: [0.0, 0] for task in tasks}
        self._before: dict[str, float] = {}
        self._steps = 0

    @property
    def weights(self) -> dict[str, float]:
        """What each task's loss weighs."""
        return dict(self._weights)

    def observe(self, seen: Mapping[str, Observation]) -> None:
        """Add up the losses; decide where an interval ends."""
        for task, seen_of_task in seen.items():
            total, count = self._sums[task]
            self._sums[task] = [total + seen_of_task.loss, count + 1]
        self._steps += 1
        if self._steps % self._every or not all(count for _, count in self._sums.values()):
            return
        means = {task: total / count for task, (total, count) in self._sums.items()}
        if self._before:
            ratios = {t: m / max(self._before[t], 1e-12) for t, m in means.items()}
            self._weights = _softmax({t: r / self._temperature for t, r in ratios.items()})
            self._weights = {t: len(means) * w for t, w in self._weights.items()}
        self._before = means
        self._sums = {task: [0.0, 0] for task in self._sums}

    def state_dict(self) -> dict[str, Any]:
        """Return what was learnt, as JSON."""
        return {
            "weights": dict(self._weights),
            "sums": dict(self._sums),
            "before": dict(self._before),
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was learnt."""
        self._weights, self._sums = dict(state["weights"]), dict(state["sums"])
        self._before, self._steps = dict(state["before"]), state["steps"]


class GradNorm:
    """GradNorm (Chen et al. 2018, algorithm 1) on the topmost matrices that all tasks share.

    Weights move so that the gradients of weighted losses become equally large there, more for
    tasks that train slowly, by the power `alpha` of their relative loss. Norms and losses of tasks
    that a step does not have are those of their last step.
    """

    def __init__(self, tasks: Sequence[str], *, lr: float, alpha: float) -> None:
        """Begin with weights of 1; `lr` is that of the weights, whose optimizer is Adam."""
        self._weights = dict.fromkeys(tasks, 1.0)
        self._alpha = alpha
        self._adam = _Adam(lr)
        self._first: dict[str, float] = {}
        self._latest: dict[str, list[float]] = {}

    @property
    def weights(self) -> dict[str, float]:
        """What each task's loss weighs."""
        return dict(self._weights)

    def observe(self, seen: Mapping[str, Observation]) -> None:
        """Move the weights, once every task has been measured."""
        for task, of_task in seen.items():
            if of_task.norm is not None:
                self._first.setdefault(task, of_task.loss)
                self._latest[task] = [of_task.loss, of_task.norm]
        measured = any(o.norm is not None for o in seen.values())
        if not measured or len(self._latest) < len(self._weights):
            return
        rates = {t: loss / max(self._first[t], 1e-12) for t, (loss, _) in self._latest.items()}
        mean_rate = math.fsum(rates.values()) / len(rates)
        sizes = {t: self._weights[t] * norm for t, (_, norm) in self._latest.items()}
        mean_size = math.fsum(sizes.values()) / len(sizes)
        gradients: dict[str, float] = {}
        for task, size in sizes.items():
            wanted = mean_size * (rates[task] / max(mean_rate, 1e-12)) ** self._alpha
            sign = (size > wanted) - (size < wanted)
            gradients[task] = sign * self._latest[task][1]
        self._adam.step(self._weights, gradients)
        positive = {t: max(w, _LEAST) for t, w in self._weights.items()}
        total = math.fsum(positive.values())
        self._weights = {t: len(positive) * w / total for t, w in positive.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what was learnt, as JSON."""
        return {
            "weights": dict(self._weights),
            "moments": dict(self._adam.moments),
            "first": dict(self._first),
            "latest": dict(self._latest),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was learnt."""
        self._weights, self._adam.moments = dict(state["weights"]), dict(state["moments"])
        self._first, self._latest = dict(state["first"]), dict(state["latest"])


class Famo:
    """Fast adaptive multitask optimization, FAMO (Liu et al. 2023, algorithm 1).

    Each task is to improve by the same share of its loss. The gradient of the weights' logits is
    that of the improvement of the logarithms from one step to the next. The paper looks at the same
    rows before and after an update; here the losses are of the rows that each step has anyway, so
    that it costs no further forward.
    """

    def __init__(self, tasks: Sequence[str], *, lr: float, decay: float) -> None:
        """Begin with equal weights.

        Args:
            tasks: The tasks.
            lr: Of the logits, whose optimizer is Adam.
            decay: Pull of the logits to zero (the paper's gamma).
        """
        self._logits = dict.fromkeys(tasks, 0.0)
        self._decay = decay
        self._adam = _Adam(lr)
        self._losses: dict[str, float] = {}

    @property
    def weights(self) -> dict[str, float]:
        """What each task's loss weighs; their mean is 1."""
        if len(self._losses) < len(self._logits):
            return dict.fromkeys(self._logits, 1.0)
        shares = _softmax(self._logits)
        parts = {t: shares[t] / max(self._losses[t], _LEAST) for t in shares}
        total = math.fsum(parts.values())
        return {t: len(parts) * part / total for t, part in parts.items()}

    def observe(self, seen: Mapping[str, Observation]) -> None:
        """Move the logits by how much the losses have fallen since they were seen last."""
        known = len(self._losses) == len(self._logits)
        falls = dict.fromkeys(self._logits, 0.0)
        for task, of_task in seen.items():
            if task in self._losses:
                before, after = self._losses[task], of_task.loss
                falls[task] = math.log(max(before, _LEAST)) - math.log(max(after, _LEAST))
            self._losses[task] = of_task.loss
        if not known:
            return
        shares = _softmax(self._logits)
        mean = math.fsum(shares[t] * falls[t] for t in shares)
        self._adam.step(
            self._logits,
            {t: shares[t] * (falls[t] - mean) + self._decay * self._logits[t] for t in shares},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what was learnt, as JSON."""
        return {
            "logits": dict(self._logits),
            "moments": dict(self._adam.moments),
            "losses": dict(self._losses),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was learnt."""
        self._logits, self._adam.moments = dict(state["logits"]), dict(state["moments"])
        self._losses = dict(state["losses"])


# No loss or weight is taken to be smaller.
_LEAST = 1e-8


def _softmax(values: Mapping[str, float]) -> dict[str, float]:
    most = max(values.values())
    powers = {name: math.exp(value - most) for name, value in values.items()}
    total = math.fsum(powers.values())
    return {name: power / total for name, power in powers.items()}
