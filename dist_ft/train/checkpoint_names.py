"""How checkpoints are called; quick to import for who only looks which there are."""

from __future__ import annotations

import re
from pathlib import Path

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def checkpoints_by_step(root: Path) -> list[tuple[int, Path]]:
    """Return step and folder of all checkpoints below `root`, whole or not, the newest last."""
    if not root.is_dir():
        return []
    found = [(m, p) for p in root.iterdir() if (m := _NAME.fullmatch(p.name))]
    return sorted((int(m.group(1)), p) for m, p in found)


def newest_step(root: Path) -> int:
    """Return the step of the newest checkpoint that was finished, 0 without one."""
    finished = [step for step, folder in checkpoints_by_step(root) if (folder / MANIFEST).is_file()]
    return max(finished, default=0)
