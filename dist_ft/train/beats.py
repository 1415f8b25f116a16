"""What tells the launcher which section of a run a rank is in, and how long that may take."""

from __future__ import annotations

from collections.abc import Callable

from dist_ft.config import Recipe
from dist_ft.heartbeat import Heartbeat
from dist_ft.train.loop import Run

# Sections that may take longer than a step, and whose length no rank knows.
SLOW_SECTIONS = {"start", "phase change", "save"}


def make_beat(recipe: Recipe, run: Run, heartbeat: Heartbeat) -> Callable[[str], None]:
    """Return what tells the launcher which section of the run this rank enters."""
    limits = recipe.supervision

    def beat(section: str) -> None:
        # The first step of a process builds and compiles what later ones find.
        slow = section in SLOW_SECTIONS or run.busy_s == 0
        heartbeat.beat(
            section,
            step=run.progress.step,
            phase=run.progress.phase,
            timeout_s=limits.slow_timeout_s if slow else limits.timeout_s,
        )

    return beat
