"""What every benchmark shares: arguments, claims, the table and the JSON file."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

Direction = Literal["at most", "at least"]
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Claim:
    """A number and the bound that it must keep.

    Attributes:
        name: What is claimed.
        value: What was measured; None if it could not be.
        bound: What it is compared with.
        direction: Which side of the bound is good.
        holds: Whether the claim holds.
    """

    name: str
    value: float | None
    bound: float
    direction: Direction
    holds: bool


def claim(name: str, *, value: float | None, bound: float, direction: Direction) -> Claim:
    """Return the claim; what was not measured does not hold."""
    holds = value is not None and (value <= bound if direction == "at most" else value >= bound)
    return Claim(name, value, bound, direction, holds)


def parse_arguments(
    description: str,
    arguments: Sequence[str] | None,
    *,
    more: Callable[[argparse.ArgumentParser], None] = lambda parser: None,  # noqa: ARG005 - none
) -> argparse.Namespace:
    """Return ``quick``, ``json`` and ``check``, and what `more` adds to them."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less of it, within a minute")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--check", action="store_true", help="exit 1 if a claim doesn't hold")
    more(parser)
    return parser.parse_args(arguments)


def say(text: str = "") -> None:
    """Write a line to the terminal at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def markdown_table(rows: Sequence[Mapping[str, Any]], *, columns: Mapping[str, str]) -> str:
    """Return the rows as a Markdown table that reads well as plain text.

    Args:
        rows: Values by key; None is shown as a dash, a float with two digits.
        columns: Headings by key, from left to right.
    """
    cells = [list(columns.values()), *([_cell(row.get(key)) for key in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    numeric = [all(isinstance(row.get(key), int | float | None) for row in rows) for key in columns]
    lines = [_line(line, widths=widths, numeric=numeric) for line in cells]
    rule = "|".join(
        "-" * (w + 1) + (":" if n else "-") for w, n in zip(widths, numeric, strict=True)
    )
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return "0" if value == 0 else f"{value:.1e}" if abs(value) < 0.01 else f"{value:.3f}"
    return str(value)


def _line(cells: Iterable[str], *, widths: Sequence[int], numeric: Sequence[bool]) -> str:
    padded = (
        c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric, strict=True)
    )
    return f"| {' | '.join(padded)} |"


def report(
    rows: Sequence[Mapping[str, Any]],
    *,
    claims: Sequence[Claim],
    packages: Iterable[str],
    options: argparse.Namespace,
) -> int:
    """Print the claims, write the JSON file if it is wanted, and return the exit code."""
    for one in claims:
        verdict = "holds" if one.holds else "DOES NOT HOLD"
        say(f"{verdict}: {one.name}: {_cell(one.value)} ({one.direction} {_cell(one.bound)})")
    if options.json:
        body = {
            "hardware": hardware(),
            "versions": versions(packages),
            "commit": commit(),
            "rows": list(rows),
            "claims": [asdict(one) for one in claims],
        }
        options.json.write_text(json.dumps(body, indent=1) + "\n")
    return int(options.check and not all(one.holds for one in claims))


def hardware() -> dict[str, Any]:
    """Return what the numbers were measured on."""
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the version of Python and of each package, None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """Return the commit of the working tree, with ``+`` if it has changes; None outside git."""
    try:
        head, changes = (
            subprocess.run(
                ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changes else "")
