"""A run as the report reads it: events, recipe, environment, and the series they hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dist_ft.recipe.task_checks import METRICS
from dist_ft.train.recorder import ending, read_events, surviving_events
from dist_ft.train.signals import stop_name

# Of the tables that compare runs; a run of such a name would stand in their place.
COLUMNS = ("key", "task", "split", "metric")
Event = dict[str, Any]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder holds.

    Attributes:
        path: The folder.
        events: As the run went in the end.
        all_events: Also those of work that a crash undid.
        recipe: Resolved.
        environment: Versions, devices, command; empty if it was never written.
        analysis: What ``evaluate --analysis`` wrote; empty without it.
        label: What tells it from the runs that it is shown with, see `labelled`.
    """

    path: Path
    events: list[Event]
    all_events: list[Event]
    recipe: dict[str, Any]
    environment: dict[str, Any]
    analysis: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def name(self) -> str:
        """The folder's name, also of one that was given as `.`."""
        return self.path.resolve().name

    def of(self, kind: str) -> list[Event]:
        """Return the events of one kind."""
        return [e for e in self.events if e["event"] == kind]

    @cached_property
    def last_step(self) -> int:
        """The last step that any event speaks of."""
        return max((e["step"] for e in self.events), default=0)

    @cached_property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the recipe's order."""
        return [task["name"] for task in self.recipe.get("tasks", [])]

    @property
    def outcome(self) -> str:
        """How the run ended, in words."""
        last = ending(self.events)
        if last is None:
            return "not ended: still running, or killed"
        if last["event"] == "end":
            return "finished"
        return f"stopped by {stop_name(last.get('signal'))}, can be resumed"

    @cached_property
    def seconds(self) -> float:
        """Wall time from the first event to the last, all starts added up."""
        total, last = 0.0, 0.0
        for event in self.all_events:
            if event["time_s"] < last:
                total += last
            last = event["time_s"]
        return total + last

    def steps(self, task: str | None = None) -> list[Event]:
        """Return the step events, of one task or of all."""
        return [e for e in self.of("step") if task in (None, e["task"])]

    def series(self, field: str, *, task: str | None = None, scale: float = 1.0) -> Points:
        """Return (step, value) of a step event's field; one point a step."""
        found: dict[int, float] = {}
        for event in self.steps(task):
            if event.get(field) is not None:
                found[event["step"]] = event[field] * scale
        return [(float(step), value) for step, value in sorted(found.items())]

    def scores(self, task: str, *, split: str = "validation") -> dict[str, Points]:
        """Return (step, value) of every metric of a task."""
        curves: dict[str, Points] = {}
        for event in self.of("eval"):
            if event["task"] == task and event["split"] == split:
                for name, value in event["metrics"].items():
                    curves.setdefault(name, []).append((float(event["step"]), value))
        return {name: sorted(dict(points).items()) for name, points in curves.items()}

    def latest(self) -> list[Event]:
        """Return the latest evaluation of each task and split."""
        found: dict[tuple[str, str], Event] = {}
        for event in self.of("eval"):
            key = (event["task"], event["split"])
            # One with intervals is not hidden by the plain one of the same step.
            earlier = found.get(key, {})
            found[key] = {**earlier, **event} if earlier.get("step") == event["step"] else event
        return [found[key] for key in sorted(found)]

    def primary(self, task: str) -> str | None:
        """Return the metric that decides for a task: the recipe's, or the first of its type.

        Plain tags have other metrics than BIO tags, so only those count that were scored.
        """
        config = next((t for t in self.recipe.get("tasks", []) if t["name"] == task), {})
        kind = str(config.get("problem", config.get("type")))
        if kind == "generation" and config.get("max_new_tokens"):
            kind = "generation with text"
        if config.get("metric"):
            return str(config["metric"])
        names = METRICS.get(kind, ())
        scored = {n for e in self.of("eval") if e["task"] == task for n in e["metrics"]}
        return next((name for name in names if name in scored), next(iter(names), None))

    def cumulative(self, weight: Callable[[Event], float]) -> dict[str, Points]:
        """Return each task's running share of a weight over the steps."""
        sums = dict.fromkeys(self.tasks, 0.0)
        curves: dict[str, Points] = {task: [] for task in self.tasks}
        by_step: dict[int, list[Event]] = {}
        for event in self.steps():
            by_step.setdefault(event["step"], []).append(event)
        for step, events in sorted(by_step.items()):
            for event in events:
                sums[event["task"]] = sums.get(event["task"], 0.0) + weight(event)
            total = sum(sums.values())
            for task in self.tasks:
                if total:
                    curves[task].append((float(step), sums[task] / total))
        return curves


def read_run(path: Path) -> RunRecord:
    """Return the record of a run.

    Raises:
        ValueError: If the folder holds no record of a run.
    """
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(f"{path} holds no metrics.jsonl: train it first")
    return RunRecord(
        path=path,
        events=surviving_events(metrics),
        all_events=list(read_events(metrics)),
        recipe=_json(path / "recipe.json"),
        environment=_json(path / "env.json"),
        analysis=_json(path / "analysis.json"),
        label=path.resolve().name,
    )


def labelled(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the runs with labels that differ from each other and from the tables' own columns.

    A name that is not enough gets the folder above it, or else its number.
    """
    names = [run.name for run in runs]
    longer = [f"{run.path.resolve().parent.name}/{run.name}" for run in runs]
    taken = {*COLUMNS, *(name for name in names if names.count(name) == 1)}
    found: list[RunRecord] = []
    for number, run in enumerate(runs, start=1):
        label, above = run.name, longer[number - 1]
        if label in COLUMNS or names.count(label) > 1:
            is_free = longer.count(above) == 1 and above not in taken
            label = above if is_free else f"{label} ({number})"
            while label in taken:
                label += "'"
            taken.add(label)
        found.append(replace(run, label=label))
    return found


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def thinned(points: Sequence[tuple[float, float]], *, most: int = 400) -> Points:
    """Return at most `most` points: the means of equal runs of neighbours."""
    if len(points) <= most:
        return list(points)
    width = -(-len(points) // most)
    parts = [points[i : i + width] for i in range(0, len(points), width)]
    return [(p[-1][0], sum(v for _, v in p) / len(p)) for p in parts]


def flatten(value: Any, *, path: str = "") -> dict[str, Any]:
    """Return the leaves of a recipe by dotted path; tasks by their names."""
    if isinstance(value, dict):
        items = {str(k): v for k, v in value.items()}
    elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        items = {str(v.get("name", i)): v for i, v in enumerate(value)}
    else:
        return {path: value}
    found: dict[str, Any] = {}
    for key, item in items.items():
        found |= flatten(item, path=f"{path}.{key}" if path else key)
    return found
