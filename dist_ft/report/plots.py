"""The plots of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dist_ft.report.analysis import reliability_plots
from dist_ft.report.record import Event, RunRecord, thinned
from dist_ft.report.svg import (
    SHADES,
    Axes,
    Cell,
    Line,
    Plot,
    bar_plot,
    drawable,
    grid_plot,
    left_out,
    line_plot,
    shade,
    tick,
)

_STEP = "optimizer step"
_GIB = 2**-30
_MIB = 2**-20
# Metrics that are shares of 1; others have scales of their own.
_UNBOUNDED = {"loss", "perplexity", "mse", "mae"}


def plots_of(run: RunRecord) -> Iterator[Plot]:
    """Yield the plots of a run that its record has data for."""
    makers: tuple[Callable[[RunRecord], Plot | None], ...] = (
        _loss, _timeline, _norm_timeline, _drift_timeline, _rates, _norms, _throughput,
        _memory, _phase_bytes, _mixture, _padding,
    )  # fmt: skip
    for plot in makers[:1]:
        if (made := plot(run)) is not None:
            yield made
    for task in run.tasks:
        yield from _scores(run, task)
    for plot in makers[1:]:
        if (made := plot(run)) is not None:
            yield made
    yield from reliability_plots(run.analysis)


def _axes(run: RunRecord, y: str, *, from_zero: bool = False, log: bool = False) -> Axes:
    marks = [(e["step"], f"phase {e['phase']} from step {e['step']}") for e in run.of("phase")]
    return Axes(x=_STEP, y=y, marks=marks, from_zero=from_zero, log=log)


def _loss(run: RunRecord) -> Plot | None:
    lines = [Line(task, thinned(run.series("loss", task=task))) for task in run.tasks]
    axes = _axes(run, "training loss (mean per label, log scale)", log=True)
    return line_plot("loss", "Training loss of each task", lines, axes)


def _scores(run: RunRecord, task: str) -> Iterator[Plot]:
    curves = run.scores(task)
    shares = [
        Line(name, p)
        for name, p in curves.items()
        if name not in _UNBOUNDED and not any(abs(v) > 1 and drawable(v) for _, v in p)
    ]
    axes = _axes(run, "validation score (0 to 1)", from_zero=True)
    plot = line_plot(f"scores-{task}", f"Validation scores of {task}", shares, axes)
    if plot is not None:
        yield plot
    losses = [Line(name, p) for name, p in curves.items() if name == "loss"]
    axes = _axes(run, "validation loss (mean per label)")
    plot = line_plot(f"validation-loss-{task}", f"Validation loss of {task}", losses, axes)
    if plot is not None:
        yield plot


def _groups(run: RunRecord) -> list[str]:
    """Return the layer groups, bottom to top."""
    for kind, field in (("start", "layer_groups"), ("groups", "drift")):
        for event in run.of(kind):
            if event.get(field):
                return list(event[field])
    names: dict[str, None] = {}
    for event in run.of("phase"):
        names.update(dict.fromkeys(event["trainable_groups"]))
    return list(names)


def _phase_spans(run: RunRecord) -> list[tuple[int, int, Event]]:
    phases = run.of("phase")
    ends = [e["step"] for e in phases[1:]] + [max(run.last_step, 1)] * bool(phases)
    return [(e["step"], end, e) for e, end in zip(phases, ends, strict=True) if end > e["step"]]


def _timeline(run: RunRecord) -> Plot | None:
    spans = _phase_spans(run)
    rows = [
        (
            name,
            [
                Cell(
                    start,
                    end,
                    "on c2" if name in e["trainable_groups"] else "frozen",
                    f"{'trains' if name in e['trainable_groups'] else 'frozen'}, phase "
                    f"{e['phase']}, steps {start} to {end}",
                )
                for start, end, e in spans
            ],
        )
        for name in _groups(run)
    ]
    key = [("on c2", "trains"), ("frozen", "frozen")]
    title = "What trained when: layer groups, bottom to top"
    return grid_plot("freeze-timeline", title, rows, axes=_axes(run, ""), key=key)


def _norm_timeline(run: RunRecord) -> Plot | None:
    return _shaded(run, "gradient_norm", "freeze-gradient-norm",
                   "Gradient norm of each layer group (L2 of Adam's first moment)")  # fmt: skip


def _drift_timeline(run: RunRecord) -> Plot | None:
    return _shaded(run, "drift", "freeze-drift",
                   "Drift of each layer group (L2 distance from the start, relative)")  # fmt: skip


def _shaded(run: RunRecord, field: str, slug: str, title: str) -> Plot | None:
    events = run.of("groups")
    found = [v for e in events for v in e.get(field, {}).values()]
    values = [v for v in found if drawable(v) and v > 0]
    if not values:
        return None
    title = left_out(title, sum(not drawable(v) for v in found))
    low, high = min(values), max(values)
    starts = [0, *(e["step"] for e in events[:-1])]
    rows = []
    for name in _groups(run):
        cells = []
        for start, event in zip(starts, events, strict=True):
            value = event[field].get(name, 0.0)
            is_shown = value > 0 and drawable(value)
            paint = shade(value, low=low, high=high) if is_shown else "frozen"
            at = f"{tick(value)} at step {event['step']}"
            says = at if is_shown or not drawable(value) else "frozen"
            cells.append(Cell(start, event["step"], paint, says))
        rows.append((name, cells))
    key = [(color, "") for color in SHADES]
    key[-1] = (SHADES[-1], f"{tick(low)} to {tick(high)} (log scale)")
    key.append(("frozen", "frozen, 0 or not finite"))
    return grid_plot(slug, title, rows, axes=_axes(run, ""), key=key)


def _rates(run: RunRecord) -> Plot | None:
    lines = [Line("largest learning rate", thinned(run.series("lr")))]
    return line_plot("learning-rate", "Learning rate", lines, _axes(run, "rate per step"))


def _norms(run: RunRecord) -> Plot | None:
    lines = [Line(task, thinned(run.series("grad_norm", task=task))) for task in run.tasks]
    axes = _axes(run, "L2 norm before clipping (log scale)", log=True)
    return line_plot("gradient-norm", "Gradient norm of the step", lines, axes)


def _throughput(run: RunRecord) -> Plot | None:
    lines = [Line("all ranks", thinned(run.series("tokens_per_s")))]
    axes = _axes(run, "tokens/s (padding not counted)", from_zero=True)
    return line_plot("throughput", "Throughput", lines, axes)


def _memory(run: RunRecord) -> Plot | None:
    lines = [Line("rank 0", thinned(run.series("peak_rss_bytes", scale=_GIB)))]
    axes = _axes(run, "peak resident memory (GiB)", from_zero=True)
    return line_plot("memory", "Host memory", lines, axes)


def _phase_bytes(run: RunRecord) -> Plot | None:
    rows = [
        (
            f"{e['phase']}",
            [
                e["optimizer_bytes_per_rank"] * _MIB,
                e["gradient_bytes_per_step"] * _MIB,
                e["parked_bytes_per_rank"] * _MIB,
            ],
        )
        for e in run.of("phase")
    ]
    names = ["optimizer state", "gradients of a micro-batch", "parked on the host"]
    axes = Axes(x="phase", y="MiB of one rank")
    return bar_plot("phase-memory", "Memory of each phase", rows, names=names, axes=axes)


def _mixture(run: RunRecord) -> Plot | None:
    drawn = run.cumulative(lambda e: e.get("task_steps", 0))
    lines = [Line(f"{t}, drawn", thinned(p), color=i) for i, (t, p) in enumerate(drawn.items())]
    if len(run.tasks) < 2 or not any(p for p in drawn.values()):
        return None
    for event in run.of("start")[:1]:
        plan = event.get("mixture_plan", {"steps": [], "tasks": {}})
        for task, counts in plan["tasks"].items():
            points = [(float(s), c / s) for s, c in zip(plan["steps"], counts, strict=True)]
            color = run.tasks.index(task) if task in run.tasks else None
            lines.append(Line(f"{task}, target", points, color=color, thin=True))
    axes = _axes(run, "share of the steps so far", from_zero=True)
    return line_plot("mixture", "Mixture: drawn against target", lines, axes)


def _padding(run: RunRecord) -> Plot | None:
    lines = []
    for task in run.tasks:
        points = [
            (float(e["step"]), 1 - e["task_tokens"] / e["task_positions"])
            for e in run.steps(task)
            if e.get("task_positions") and e.get("task_tokens")
        ]
        lines.append(Line(task, thinned(points)))
    axes = _axes(run, "share of input positions", from_zero=True)
    return line_plot("padding", "Padding", lines, axes)
