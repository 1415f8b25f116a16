"""Puts the page together and writes it with its plots."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Sequence
from pathlib import Path

from dist_ft.report.raster import can_draw, png_of
from dist_ft.report.record import labelled, read_run
from dist_ft.report.sections import all_plots, comparison, run_section
from dist_ft.report.svg import STYLE

_LONGEST_NAME = 200
_STYLE = """
:root{color-scheme:light dark;--back:#fff;--ink:#1c1c1c;--soft:#5c5c5c;--line:#8885}
@media (prefers-color-scheme:dark){:root{--back:#16181c;--ink:#e4e4e4;--soft:#a4a4a4}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:0 auto;padding:1rem;
background:var(--back);color:var(--ink)}
h1{font-size:1.5rem}h2{font-size:1.2rem;display:inline;margin:.6rem .6rem .3rem 0}
h3{font-size:1rem;margin:1.4rem 0 .3rem}
.table{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .7rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
.n{text-align:right;white-space:nowrap}
th{color:var(--soft);font-weight:600}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;margin:.5rem 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
figure{margin:1.2rem 0;break-inside:avoid}figcaption{font-weight:600}
figcaption a{font-weight:400;font-size:.85em}
figure svg{width:100%;min-width:40rem;height:auto;display:block}
.plot{overflow-x:auto}
pre{overflow-x:auto;font-size:.85em}summary{cursor:pointer}.note{color:var(--soft);font-size:.9em}
a{color:inherit}
@media print{:root{--back:#fff;--ink:#000}body{max-width:none}figure svg{min-width:0}
figcaption a{display:none}}
"""


def write_report(runs: Sequence[Path]) -> Path:
    """Write the page into a folder of the first run, see `report_folder`, and return its path.

    The page needs no other file and no network; each plot is also written beside it as SVG and,
    with the extra ``[report]``, as PNG.

    Raises:
        ValueError: If a folder holds no record of a run.
    """
    records = labelled([read_run(path) for path in runs])
    folder = report_folder(runs)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    shared, own = all_plots(records)
    draws = can_draw()
    for plot in (plot for plots in (shared, *own) for plot in plots):
        path = folder / "plots" / f"{plot.slug}.svg"
        path.write_text(plot.standalone(), encoding="utf-8")
        if draws:
            path.with_suffix(".png").write_bytes(png_of(plot))
    names = ", ".join(record.label for record in records)
    sections = "".join(
        run_section(record, plots, is_open=len(records) == 1 or number == 0)
        for number, (record, plots) in enumerate(zip(records, own, strict=True))
    )
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>dist_ft: {html.escape(names)}</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<link rel='icon' href='data:,'>"
        f"<style>{_STYLE}{STYLE}</style></head><body><h1>{html.escape(names)}</h1>"
        f"{comparison(records, shared)}{sections}</body></html>\n"
    )
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def report_folder(runs: Sequence[Path]) -> Path:
    """Return where the page of runs goes: ``report`` in the first, with the others' names if any.

    Where those are more than a file system takes, their number and a hash stand for them.
    """
    others = [path.resolve() for path in runs[1:]]
    name = "-".join(["report", *(path.name for path in others)])
    if len(name.encode()) > _LONGEST_NAME:
        digest = hashlib.sha256("\n".join(map(str, others)).encode()).hexdigest()
        name = f"report-{len(others)}-others-{digest[:8]}"
    return runs[0] / name
