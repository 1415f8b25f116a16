"""A self-contained HTML page about one run or several."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_ft.train.recorder import surviving_events

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #8886; text-align: right; }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; height: 12rem; } svg text { font-size: 11px; fill: currentColor; }
"""
_WIDTH, _HEIGHT, _MARGIN = 800, 180, 40


def write_report(runs: Sequence[Path]) -> Path:
    """Write the page into the first run's ``report`` folder and return its path.

    Raises:
        ValueError: If a folder holds no record of a run.
    """
    for run in runs:
        if not (run / "metrics.jsonl").is_file():
            raise ValueError(f"{run} holds no metrics.jsonl: train it first")
    folder = runs[0] / "report"
    folder.mkdir(exist_ok=True)
    path = folder / "index.html"
    names = ", ".join(html.escape(run.name) for run in runs)
    body = "\n".join(part for run in runs for part in _run_parts(run))
    path.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>dist_ft: {names}</title>"
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>{body}</html>\n"
    )
    return path


def metric_rows(run: Path) -> list[dict[str, Any]]:
    """Return the latest metrics of each task and split of a run."""
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    for event in surviving_events(run / "metrics.jsonl"):
        if event["event"] == "eval":
            row = {"task": event["task"], "split": event["split"], "step": event["step"]}
            latest[event["task"], event["split"]] = row | event["metrics"]
    return [latest[key] for key in sorted(latest)]


def _run_parts(run: Path) -> Iterable[str]:
    events = surviving_events(run / "metrics.jsonl")
    yield f"<h1>{html.escape(run.name)}</h1>"
    for row in metric_rows(run):
        title = f"{row.pop('task')}, {row.pop('split')} at step {row.pop('step')}"
        yield f"<h2>{html.escape(title)}</h2>" + _table([row])
    phases = [e for e in events if e["event"] == "phase"]
    yield "<h2>Phases</h2>" + _table(
        [
            {
                "phase": e["phase"],
                "from step": e["step"],
                "trains": ", ".join(e["trainable_groups"]),
                "parameters": f"{e['trainable_params']:,}",
                "optimizer MiB per rank": round(e["optimizer_bytes_per_rank"] / 2**20, 1),
                "change": f"{e['switch']}, {e['switch_s']} s",
            }
            for e in phases
        ]
    )
    steps = [e for e in events if e["event"] == "step"]
    for task in sorted({e["task"] for e in steps}):
        points = [(e["step"], e["loss"]) for e in steps if e["task"] == task]
        yield f"<h2>Training loss of {html.escape(task)}</h2>" + _curve(points)
    env = run / "env.json"
    if env.is_file():
        shown = html.escape(json.dumps(json.loads(env.read_text()), indent=1))
        yield f"<h2>Environment</h2><pre>{shown}</pre>"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "<p>none</p>"
    head = "".join(f"<th>{html.escape(str(key))}</th>" for key in rows[0])
    lines = ("".join(f"<td>{_cell(value)}</td>" for value in row.values()) for row in rows)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else html.escape(str(value))


def _curve(points: Sequence[tuple[int, float]]) -> str:
    """Return an SVG of (step, loss) with the ends of both axes written out."""
    last, top = max(1, *(s for s, _ in points)), max(1e-9, *(v for _, v in points))
    inner_width, inner_height = _WIDTH - 2 * _MARGIN, _HEIGHT - _MARGIN
    at = " ".join(
        f"{_MARGIN + s / last * inner_width:.1f},{inner_height * (1 - v / top) + 10:.1f}"
        for s, v in points
    )
    bottom = inner_height + 10
    return (
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img aria-label='loss by step'>"
        f"<polyline points='{at}' fill=none stroke='#0072b2' stroke-width=2 />"
        f"<line x1={_MARGIN} y1={bottom} x2={_WIDTH - _MARGIN} y2={bottom} stroke=currentColor />"
        f"<text x=0 y=15>{top:.2f}</text><text x=0 y={bottom}>0</text>"
        f"<text x={_MARGIN} y={bottom + 16}>step 0</text>"
        f"<text x={_WIDTH - 2 * _MARGIN} y={bottom + 16}>step {last}</text></svg>"
    )
