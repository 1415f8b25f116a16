"""What a search leaves behind: a table, a plot and the chosen recipe."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dist_ft.config import Recipe
from dist_ft.search.blocks import Block
from dist_ft.search.halving import Race

TABLE, PLOT, CHOSEN = "table.csv", "plot.svg", "recipe.yaml"
_ROW, _LEFT, _STACK, _RIGHT, _TOP = 18, 190, 360, 210, 46
# From those given up first to those trained to the end; told apart without hue too.
_COLOURS = ("#c6dbef", "#9ecae1", "#6baed6", "#3182bd", "#08519c")
_WINNER = "#d55e00"


@dataclass(frozen=True)
class Findings:
    """Everything that a search has found.

    Attributes:
        race: The scores and the winner.
        recipe: The recipe that the search was made for.
        chosen: The recipe that trains the winner.
        trainable_params: Elements that train, by candidate.
        total_params: Elements of the model.
        facts: Metrics and seconds by candidate, as recorded.
    """

    race: Race
    recipe: Recipe
    chosen: Recipe
    trainable_params: Mapping[Block, int]
    total_params: int
    facts: Mapping[Block, Mapping[str, Any]]


def write_findings(findings: Findings, *, folder: Path) -> str:
    """Write table, plot and chosen recipe into `folder`; return a summary as markdown."""
    rows = table_rows(findings)
    (folder / TABLE).write_text(as_csv(rows), encoding="utf-8")
    (folder / PLOT).write_text(plot(findings), encoding="utf-8")
    (folder / CHOSEN).write_text(chosen_yaml(findings), encoding="utf-8")
    return (
        f"{_markdown(rows)}\n\n{cost_line(findings.race)}\n"
        f"chosen: {_winner_line(findings)}\n"
        f"written: {folder / CHOSEN}, {TABLE}, {PLOT}"
    )


def table_rows(findings: Findings) -> list[dict[str, Any]]:
    """Return a row for each candidate, best first: who was trained longer, then who scored more."""
    race = findings.race
    rows: list[dict[str, Any]] = []
    for place, block in enumerate(race.ranking(), start=1):
        step = max(race.scores[block])
        params, facts = findings.trainable_params[block], findings.facts[block]
        rows.append(
            {
                "place": place,
                "trains": block.describe(race.space.total),
                "lo": block.lo,
                "hi": block.hi,
                "trainable_params": params,
                "trainable_share": params / findings.total_params,
                "steps": step,
                "score": race.scores[block][step].value,
                "loss": race.scores[block][step].loss,
                **metric_columns(facts.get("metrics", {}), recipe=findings.recipe),
                "seconds": facts.get("seconds", 0.0),
            }
        )
    return rows


def metric_columns(
    metrics: Mapping[str, Mapping[str, float]], *, recipe: Recipe
) -> dict[str, float]:
    """Return every metric of every task as one column each, baselines left out."""
    return {
        f"{task.name}.{name}": value
        for task in recipe.tasks
        for name, value in metrics.get(task.name, {}).items()
        if not name.startswith("baseline_")
    }


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV with a column for each name."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| | trains | parameters | share | steps | score | loss | seconds |",
        "|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {r['place']} | {r['trains']} | {r['trainable_params']:,} "
        f"| {100 * r['trainable_share']:.1f} % | {r['steps']} | {r['score']:.4f} "
        f"| {r['loss']:.4f} | {r['seconds']:.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


def cost_line(race: Race) -> str:
    """Return what the search cost beside training the whole finest grid to the end."""
    space, total = race.space, race.rungs[-1]
    grid = space.grid(space.granule)
    steps, cost = len(grid) * total, space.grid_cost() * total
    return (
        f"cost: {race.steps:,} steps for {len(race.scores)} of {len(grid)} candidates, "
        f"{100 * race.steps / steps:.1f} % of the {steps:,} steps of the whole grid "
        f"({100 * race.cost / cost:.1f} % of its arithmetic, where a frozen prefix has no backward "
        "pass)"
    )


def _winner_line(findings: Findings) -> str:
    race = findings.race
    assert race.best is not None
    share = findings.trainable_params[race.best] / findings.total_params
    return (
        f"{race.best.describe(race.space.total)} (of {race.space.total} blocks), validation score "
        f"{race.scores[race.best][race.rungs[-1]].value:.4f} after {race.rungs[-1]} steps, "
        f"{100 * share:.1f} % of the parameters"
    )


def chosen_yaml(findings: Findings) -> str:
    """Return the chosen recipe as YAML; what it leaves out is the default."""
    notes = [
        f"Chosen by dist-ft search for {findings.recipe.name}: {_winner_line(findings)}.",
        cost_line(findings.race),
    ]
    body = findings.chosen.model_dump(mode="json", exclude_defaults=True)
    return "".join(f"# {note}\n" for note in notes) + yaml.safe_dump(body, sort_keys=False)


def plot(findings: Findings) -> str:
    """Return an SVG with a row for each candidate, best first, and a bar over what it trains."""
    race = findings.race
    ranking = race.ranking()
    width, height = _LEFT + _STACK + _RIGHT, _TOP + _ROW * len(ranking) + 10
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' "
        f"height='{height}' font-family='system-ui, sans-serif' font-size='12' role='img' "
        "aria-label='candidates of the search, best first'>",
        f"<rect width='{width}' height='{height}' fill='white'/>",
        *_axis(race.space.total, height=height),
    ]
    for i, block in enumerate(ranking):
        parts += _bar(race, block, y=_TOP + _ROW * i)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axis(total: int, *, height: int) -> Iterable[str]:
    yield "<text x='8' y='18'>trains</text>"
    yield f"<text x='{_LEFT}' y='18'>transformer blocks, bottom to top</text>"
    yield f"<text x='{_LEFT + _STACK + 12}' y='18'>score after steps</text>"
    labelled = range(0, total, max(1, -(-total // 12)))
    for i in range(total + 1):
        x = _LEFT + _STACK * i / total
        yield f"<line x1='{x:.1f}' y1='{_TOP - 6}' x2='{x:.1f}' y2='{height - 8}' stroke='#ddd'/>"
        if i in labelled:
            middle = x + _STACK / total / 2
            yield f"<text x='{middle:.1f}' y='36' text-anchor='middle' fill='#555'>{i}</text>"


def _bar(race: Race, block: Block, *, y: int) -> Iterable[str]:
    total, step = race.space.total, max(race.scores[block])
    start, end = (_LEFT + _STACK * n / total for n in (block.lo, block.hi))
    rung = race.rungs.index(step) + len(_COLOURS) - len(race.rungs)
    colour = _WINNER if block == race.best else _COLOURS[max(0, rung)]
    text = f"{race.scores[block][step].value:.4f} after {step}"
    weight = " font-weight='bold'" if block == race.best else ""
    yield f"<text x='8' y='{y + 13}'{weight}>{html.escape(block.describe(total))}</text>"
    yield (
        f"<rect x='{start:.1f}' y='{y + 3}' width='{max(2.0, end - start):.1f}' "
        f"height='{_ROW - 6}' fill='{colour}'/>"
    )
    yield f"<text x='{_LEFT + _STACK + 12}' y='{y + 13}'{weight}>{text}</text>"
