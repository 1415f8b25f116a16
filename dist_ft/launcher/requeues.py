"""Notices that a job starts again and again without a step of progress."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from dist_ft.train.checkpoint_names import newest_step

_FILE = "logs/job-starts.json"


def count_idle_starts(run: Path, *, job: str) -> int:
    """Note that a job starts; return how many of its starts in a row found nothing new saved.

    The first start of a job counts as 0, whatever others have left in the folder.

    Args:
        run: Folder of the run.
        job: Names the job, the same each time that it is requeued.
    """
    file = run / _FILE
    step = newest_step(run / "checkpoints")
    before = _read(file)
    idle = 0
    if before.get("job") == job and step <= before["step"]:
        idle = before["idle"] + 1
    # A disk that is full now is no reason not to train.
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"job": job, "step": step, "idle": idle}))
    return idle


def check_progress(run: Path, *, job: str, max_idle: int) -> None:
    """Note that a job starts, and check that it has come further since its last starts.

    Args:
        run: Folder of the run.
        job: Names the job, the same each time that it is requeued.
        max_idle: How many starts in a row may find nothing new saved.

    Raises:
        RuntimeError: If so many have.
    """
    idle = count_idle_starts(run, job=job)
    if idle >= max_idle:
        raise RuntimeError(
            f"job {job} was requeued {idle} times in a row without a step of progress (the newest "
            f"checkpoint in {run} is of step {newest_step(run / 'checkpoints')}): give it more "
            "time (--time), save more often (checkpoint.every, checkpoint.ephemeral_every), and "
            "submit it again; not requeued"
        )


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
        return {"job": found["job"], "step": int(found["step"]), "idle": int(found["idle"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # none yet, or it was cut short
