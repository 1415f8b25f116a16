"""The part of the page about what ``evaluate --analysis`` found."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dist_ft.report.svg import Axes, Line, Plot, line_plot

MakeTable = Callable[[Sequence[Mapping[str, Any]]], str]


def analysis_section(analysis: Mapping[str, Any], *, table: MakeTable) -> str:
    """Return the section; nothing if there was no analysis.

    Args:
        analysis: What ``analysis.json`` holds.
        table: Makes an HTML table of rows.
    """
    if not analysis:
        return ""
    groups = [
        {
            "layer group": row["group"],
            "drift": f"{row['drift']:.2e}",
            "CKA to the start": f"{row['cka']:.4f}" if "cka" in row else "",
        }
        for row in analysis["groups"]
    ]
    tasks = "".join(_task(name, body, table) for name, body in analysis["tasks"].items())
    return (
        f"<h3>Analysis at step {analysis['step']}, {_e(analysis['split'])} rows</h3>"
        "<p class='note'>Drift is the distance from the pre-trained weights, relative to their "
        "norm; CKA (Kornblith et al. 2019) is 1 where a block's outputs have kept their geometry."
        f"</p>{table(groups)}{tasks}"
    )


def _e(text: object) -> str:
    return html.escape(str(text))


def _task(name: str, body: Mapping[str, Any], table: MakeTable) -> str:
    parts: list[str] = []
    if "confusion" in body:
        labels = body["labels"]
        rows = [
            {"is \u2193 taken for \u2192": label, **dict(zip(labels, counts, strict=True))}
            for label, counts in zip(labels, body["confusion"], strict=True)
        ]
        parts.append(f"<h3>Confusions of {_e(name)}</h3>{table(rows)}")
        hardest = [{**row, "loss": f"{row['loss']:.3f}"} for row in body["hardest"]]
        parts.append(f"<h3>Hardest rows of {_e(name)}</h3>{table(hardest)}")
        parts.append(_attributions(name, body.get("attributions") or {}, labels))
    parts.append(_forgotten(name, body.get("forgotten") or {}, table))
    parts.append(_robustness(name, body.get("robustness") or {}, table))
    return "".join(parts)


def _forgotten(name: str, found: Mapping[str, Any], table: MakeTable) -> str:
    if not found:
        return ""
    note = (
        f"Right and, at the next of {found['evaluations']} evaluations, wrong again "
        f"{found['events']} times (Toneva et al. 2019). {found['never_forgotten']} rows were "
        f"learnt and never forgotten, {found['never_learnt']} never right."
    )
    rows = table(found["rows"]) if found["rows"] else ""
    return f"<h3>Most forgotten rows of {_e(name)}</h3><p class='note'>{note}</p>{rows}"


def _robustness(name: str, found: Mapping[str, Any], table: MakeTable) -> str:
    if "under" not in found:
        return ""
    metric = found["metric"]
    rows = [
        {
            "transform": one["transform"],
            "share of words": "" if one["share"] is None else f"{one['share']:g}",
            "rows changed": one["changed_rows"],
            metric: f"{found['clean'] + one['difference']:.4f}",
            "difference": f"{one['difference']:+.4f}",
            "95 % interval": f"{one['interval'][0]:+.4f} to {one['interval'][1]:+.4f}",
        }
        for one in found["under"]
    ]
    return (
        f"<h3>{_e(name)} under noise</h3><p class='note'>{_e(metric)} is {found['clean']:.4f} on "
        f"{found['rows']} rows as they are; the intervals are of the paired difference.</p>"
        f"{table(rows)}"
    )


def reliability_plots(analysis: Mapping[str, Any]) -> Iterator[Plot]:
    """Yield a reliability diagram for each task."""
    for name, body in analysis.get("tasks", {}).items():
        found = body.get("calibration")
        if not found:
            continue
        points = [(b["confidence"], b["accuracy"]) for b in found["bins"]]
        lines = [Line(name, points), Line("as sure as right", [(0, 0), (1, 1)], thin=True)]
        axes = Axes("mean confidence of a bin", "share that is right", from_zero=True)
        title = f"Reliability of {name}, expected calibration error {found['ece']:.4f}"
        plot = line_plot(f"reliability-{name}", title, lines, axes)
        if plot is not None:
            yield plot


def _attributions(name: str, found: Mapping[str, Any], labels: Sequence[str]) -> str:
    if "tokens" not in found:
        reason = found.get("skipped")
        return f"<p class='note'>No token attributions: {_e(reason)}</p>" if reason else ""
    largest = max(map(abs, found["values"]), default=0.0) or 1.0
    marks = []
    for token, value in zip(found["tokens"], found["values"], strict=True):
        color = "70,130,220" if value > 0 else "220,110,60"
        marks.append(
            f"<span title='{value:+.4f}' style='background:rgba({color},"
            f"{abs(value) / largest:.2f})'>{_e(token)}</span>"
        )
    return (
        f"<h3>What the hardest row of {_e(name)} was judged by</h3><p>{' '.join(marks)}</p>"
        f"<p class='note'>Integrated gradients (Sundararajan et al. 2017) of the probability of "
        f"{_e(labels[found['prediction']])} ({found['probability']:.3f}; "
        f"{found['baseline_probability']:.3f} without the words): blue for it, orange against."
        "</p>"
    )
