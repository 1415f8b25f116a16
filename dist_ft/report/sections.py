"""The parts of the page: tables and plots of one run, and what several runs differ in."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from dist_ft.report.analysis import analysis_section
from dist_ft.report.plots import plots_of
from dist_ft.report.raster import can_draw
from dist_ft.report.record import Event, RunRecord, flatten, thinned
from dist_ft.report.svg import Axes, Line, Plot, line_plot, tick
from dist_ft.train.signals import stop_name

_FIGURES = re.compile(r"[-+\d.,e %]+( to [-+\d.,e]+)?")
_FAULTS = ("failure", "resume", "stop", "bad_numbers", "roll_back", "checkpoint_failed",
           "out_of_memory", "straggler")  # fmt: skip


def run_section(run: RunRecord, plots: Sequence[Plot], *, is_open: bool) -> str:
    """Return everything about one run."""
    state = " open" if is_open else ""
    return (
        f"<details class='run'{state}><summary><h2>{_e(run.label)}</h2> {_e(run.outcome)}"
        f"</summary>{_facts(run)}"
        f"<h3>Scores</h3>{_scores(run)}"
        f"<h3>Phases</h3>{_phases(run)}"
        + "".join(_figure(plot) for plot in plots)
        + analysis_section(run.analysis, table=table)
        + f"<h3>Faults and restarts</h3>{_faults(run)}"
        f"<h3>Checkpoints</h3>{_checkpoints(run)}"
        f"<details><summary>Recipe, as resolved</summary><pre>{_e(_as_yaml(run.recipe))}</pre>"
        f"</details><details><summary>Environment</summary>"
        f"<pre>{_e(json.dumps(run.environment, indent=1))}</pre></details></details>"
    )


def all_plots(runs: Sequence[RunRecord]) -> tuple[list[Plot], list[list[Plot]]]:
    """Return the plots that compare the runs, and those of each."""
    own = [list(plots_of(run)) for run in runs]
    if len(runs) == 1:
        return [], own
    # With several runs their names tell the files apart.
    named = [
        [replace(plot, slug=f"{number}-{run.name}-{plot.slug}") for plot in plots]
        for number, (run, plots) in enumerate(zip(runs, own, strict=True), start=1)
    ]
    return list(_overlays(runs)), named


def comparison(runs: Sequence[RunRecord], plots: Sequence[Plot]) -> str:
    """Return what the runs differ in and how they compare; nothing for a single run."""
    if len(runs) < 2:
        return ""
    return (
        f"<section><h2>What differs</h2>{_recipe_diff(runs)}"
        f"<h2>Scores side by side</h2>{_side_by_side(runs)}"
        + "".join(_figure(plot) for plot in plots)
        + "</section>"
    )


def _e(text: object) -> str:
    return html.escape(str(text))


def _figure(plot: Plot) -> str:
    kinds = ("svg", "png") if can_draw() else ("svg",)
    links = " ".join(
        f"<a href='{_e(f'plots/{plot.slug}.{kind}')}' download>{kind.upper()}</a>" for kind in kinds
    )
    return (
        f"<figure id='{_e(plot.slug)}'><figcaption>{_e(plot.title)} {links}</figcaption>"
        f"<div class='plot'>{plot.body}</div></figure>"
    )


def _facts(run: RunRecord) -> str:
    environment = run.environment
    starts = run.of("start")
    world = environment.get("world_size", 1)
    total = starts[0]["total_steps"] if starts else None
    tokens = max((e["tokens"] for e in run.steps()), default=0)
    versions = environment.get("versions", {})
    rows = {
        "tasks": ", ".join(run.tasks),
        "model": run.recipe.get("model", {}).get("path", ""),
        "freezing": run.recipe.get("freezing", {}).get("policy", ""),
        "steps": f"{run.last_step:,}" + (f" of {total:,}" if total else ""),
        "tokens": f"{tokens:,} (padding not counted)",
        "time": _time(run.seconds),
        "where": f"{world} rank{'s' if world != 1 else ''}, {environment.get('device', '?')}",
        "engine": " ".join(
            f"{k}={v}" for k, v in run.recipe.get("engine", {}).items() if v not in (None, False)
        ),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
        "commit": environment.get("commit") or "unknown",
    }
    return "<dl>" + "".join(f"<dt>{_e(k)}</dt><dd>{_e(v)}</dd>" for k, v in rows.items()) + "</dl>"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _scores(run: RunRecord) -> str:
    rows = [
        {
            "task": event["task"],
            "split": event["split"],
            "metric": f"{name} (decides)" if name == run.primary(event["task"]) else name,
            "value": tick(value),
            "95 % interval": _interval(event, name),
            "rows": f"{event['rows']:,}" if event.get("rows") else "",
            "step": f"{event['step']:,}",
        }
        for event in run.latest()
        for name, value in event["metrics"].items()
    ]
    if not rows:
        return "<p>none yet</p>"
    note = (
        "<p class='note'>Intervals: percentile bootstrap over the rows, 200 draws, by "
        "<code>dist-ft evaluate</code>. A baseline is what a trivial answer scores.</p>"
    )
    every = f"<details><summary>All metrics</summary>{table(rows)}</details>"
    return table(_deciding(run)) + note + every


def _deciding(run: RunRecord) -> list[dict[str, str]]:
    """Return the score that decides of each task and split, beside its trivial baseline."""
    rows: list[dict[str, str]] = []
    for event in run.latest():
        metrics, name = event["metrics"], run.primary(event["task"])
        if name is None or name not in metrics:
            continue
        trivial = [v for k, v in metrics.items() if k.startswith("base") and k.endswith(f"_{name}")]
        rows.append(
            {
                "task": event["task"],
                "split": event["split"],
                "metric": name,
                "value": tick(metrics[name]),
                "95 % interval": _interval(event, name),
                "baseline": tick(max(trivial)) if trivial else "",
            }
        )
    return rows


def _interval(event: Event, name: str) -> str:
    low_high = (event.get("intervals") or {}).get(name)
    return " to ".join(map(tick, low_high)) if low_high else ""


def _phases(run: RunRecord) -> str:
    most = 40
    phases = run.of("phase")
    rows = [
        {
            "phase": e["phase"],
            "from step": f"{e['step']:,}",
            "trains": _short(e["trainable_groups"]),
            "parameters": f"{e['trainable_params']:,}",
            "optimizer, MiB a rank": f"{e['optimizer_bytes_per_rank'] / 2**20:,.1f}",
            "change": f"{e['switch']}, {e['switch_s']:.3g} s",
        }
        for e in phases[:most]
    ]
    rest = f"<p>and {len(phases) - most} more</p>" if len(phases) > most else ""
    return table(rows) + rest


def _short(names: Sequence[str]) -> str:
    return (
        ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:7])} and {len(names) - 7} more"
    )


def _faults(run: RunRecord) -> str:
    rows = [
        {"what": event["event"], "step": event["step"], "detail": _detail(event)}
        for event in run.all_events
        if event["event"] in _FAULTS
    ]
    lost = len(run.all_events) - len(run.events)
    if lost:
        rows.append({"what": "work done again", "step": "", "detail": f"{lost} events undone"})
    return table(rows) if rows else "<p>none</p>"


def _detail(event: Event) -> str:
    if event["event"] == "stop":
        return f"{stop_name(event.get('signal'))}, after saving"
    if event["event"] == "resume":
        return f"from {event['path']}" if event.get("path") else "from the beginning"
    known = {"event", "step", "time_s"}
    return ", ".join(
        f"{k.replace('_', ' ')} {_value(v)}" for k, v in event.items() if k not in known
    )


def _checkpoints(run: RunRecord) -> str:
    saved = run.of("checkpoint")
    if not saved:
        return "<p>none</p>"
    seconds = [e["save_s"] for e in saved]
    return (
        f"<p>{len(saved)}, the last at step {saved[-1]['step']:,}: "
        f"{saved[-1]['bytes'] / 2**20:,.1f} MiB; {sum(seconds) / len(seconds):.2g} s each</p>"
    )


def _recipe_diff(runs: Sequence[RunRecord]) -> str:
    flat = [flatten(run.recipe) for run in runs]
    keys = sorted(set().union(*flat))
    rows = [
        {"key": key, **{r.label: _value(f.get(key, "")) for r, f in zip(runs, flat, strict=True)}}
        for key in keys
        if key != "name" and len({_value(f.get(key, "")) for f in flat}) > 1
    ]
    return table(rows) if rows else "<p>nothing in the recipes</p>"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _side_by_side(runs: Sequence[RunRecord]) -> str:
    rows = []
    keys = dict.fromkeys((e["task"], e["split"]) for run in runs for e in run.latest())
    for task, split in keys:
        found = [
            next((e for e in r.latest() if (e["task"], e["split"]) == (task, split)), None)
            for r in runs
        ]
        for name in dict.fromkeys(n for e in found if e for n in e["metrics"]):
            cells = {
                r.label: tick(e["metrics"][name]) if e and name in e["metrics"] else ""
                for r, e in zip(runs, found, strict=True)
            }
            rows.append({"task": task, "split": split, "metric": name, **cells})
    return table(rows)


def _overlays(runs: Sequence[RunRecord]) -> Iterable[Plot]:
    tasks = dict.fromkeys(task for run in runs for task in run.tasks)
    for task in tasks:
        lines = [Line(run.label, thinned(run.series("loss", task=task))) for run in runs]
        axes = Axes(x="optimizer step", y="training loss (mean per label, log scale)", log=True)
        plot = line_plot(f"compare-loss-{task}", f"Training loss of {task}", lines, axes)
        if plot is not None:
            yield plot
        metric = next((m for run in runs if (m := run.primary(task))), None)
        if metric is None:
            continue
        lines = [Line(run.label, run.scores(task).get(metric, [])) for run in runs]
        axes = Axes(x="optimizer step", y=f"{metric} on validation")
        plot = line_plot(f"compare-score-{task}", f"{metric} of {task}", lines, axes)
        if plot is not None:
            yield plot


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows with the same keys as an HTML table."""
    if not rows:
        return "<p>none</p>"
    head = "".join(f"<th scope='col'>{_e(key)}</th>" for key in rows[0])
    lines = ("".join(map(_cell, row.values())) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    head = f"<thead><tr>{head}</tr></thead>"
    return f"<div class='table'><table>{head}<tbody>{body}</tbody></table></div>"


def _cell(value: Any) -> str:
    # Figures stand under each other, and none is broken over lines.
    kind = " class='n'" if _FIGURES.fullmatch(str(value)) else ""
    return f"<td{kind}>{_e(value)}</td>"


def _as_yaml(recipe: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(recipe), sort_keys=False, width=100)
