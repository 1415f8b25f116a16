"""What an examination says: findings with their remedies, and the table of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "broken"]
Probes = Mapping[str, Callable[[], Iterable["Finding"]]]


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        name: What was looked at.
        value: What was found, with its unit.
        status: "ok", "note" (works, but know it) or "broken" (a run would fail).
        remedy: What to do, empty if nothing.
    """

    name: str
    value: str
    status: Status = "ok"
    remedy: str = ""

    @property
    def is_broken(self) -> bool:
        """Whether a run would fail because of it."""
        return self.status == "broken"


def run_probes(probes: Probes) -> list[Finding]:
    """Return what the probes find; one that fails is itself a broken thing.

    Args:
        probes: By the name under which a failure is told.
    """
    findings: list[Finding] = []
    for name, probe in probes.items():
        try:
            findings.extend(probe())
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            again = "make the environment again: remove .venv, then bash launch/quickstart.sh"
            remedy = again if isinstance(error, ImportError) else "look into it: runs need it"
            findings.append(Finding(name, text, "broken", remedy))
    return findings


def print_findings(findings: Sequence[Finding], *, rank: int = 0) -> None:
    """Print a table of the findings; beside rank 0 only what is broken, a line each.

    Args:
        findings: What was found.
        rank: This process's.
    """
    if rank != 0:
        for finding in findings:
            if finding.is_broken:
                text = f"[rank {rank}] {finding.name}: {finding.value}: {finding.remedy}"
                sys.stderr.write(text + "\n")
        return
    from rich.markup import escape
    from rich.table import Table

    from dist_ft.tables import make_console

    table = Table("what", "state", "found, and the remedy")
    # Paths have no blanks to wrap at, and are longer than a terminal is wide.
    table.columns[2].overflow = "fold"
    names = [word for finding in findings for word in finding.name.split()]
    table.columns[0].min_width = max(map(len, names), default=0)
    styles = {"ok": "green", "note": "yellow", "broken": "red"}
    counts = dict.fromkeys(styles, 0)
    for finding in findings:
        counts[finding.status] += 1
        state = f"[{styles[finding.status]}]{finding.status}[/]"
        remedy = f"\n-> {finding.remedy}" if finding.remedy else ""
        table.add_row(escape(finding.name), state, escape(finding.value + remedy))
    console = make_console()
    console.print(table, soft_wrap=False)
    broken = f"[red]{counts['broken']} broken[/]" if counts["broken"] else "nothing broken"
    console.print(f"{broken}, {counts['note']} to know, {counts['ok']} as they should be")
