"""A run under the launcher's supervisor, with faults that are really injected into its ranks.

The supervisor runs in this process and forks the ranks from it, as `dist-ft launch` does: starting
them again takes tenths of a second. Faults are patches that a rank applies to itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401 # pyright: ignore[reportUnusedImport] - forked ranks have it then
import torch

from dist_ft import cli
from dist_ft.launcher.processes import fork_rank
from dist_ft.launcher.settings import LaunchSettings
from dist_ft.launcher.supervisor import Supervisor
from tests.helpers.tiny_run import newest_checkpoint

Fault = Callable[[int, int], None]


@dataclass
class Outcome:
    """How a supervised run ended."""

    code: int
    said: list[str] = field(default_factory=list)
    seconds: float = 0.0


def supervise(
    recipe: Path,
    overrides: Sequence[str] = (),
    *,
    fault: Fault = lambda attempt, rank: None,  # noqa: ARG005 - none
    resume: bool = False,
    ranks: int = 2,
    max_restarts: int = 3,
    between: Callable[[int], None] = lambda attempt: None,  # noqa: ARG005 - nothing
) -> Outcome:
    """Train under the supervisor; `fault(attempt, rank)` runs in every rank before it begins.

    `between(attempt)` runs before an attempt, in this process.
    """
    said: list[str] = []

    def start(attempt: int) -> Any:
        between(attempt)
        words = ["train", str(recipe), *overrides, *(["--resume"] if attempt or resume else [])]

        def rank_main() -> int:
            torch.set_num_threads(1)
            fault(attempt, int(os.environ["RANK"]))
            return cli.main(words)

        return fork_rank(rank_main)

    settings = LaunchSettings(ranks=ranks, max_restarts=max_restarts)
    run = recipe.parent / "runs" / _name(overrides)
    supervisor = Supervisor(settings, start=start, say=said.append, logs=run / "logs")
    began = time.monotonic()
    code = supervisor.run()
    return Outcome(code, said, time.monotonic() - began)


def _name(overrides: Sequence[str]) -> str:
    names = [word.partition("=")[2] for word in overrides if word.startswith("name=")]
    return names[-1] if names else "tiny"


def before(owner: Any, name: str, action: Callable[[int], None]) -> None:
    """Call `action(n)` before the n-th call, from 1, of a function of `owner`."""
    original, calls = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        action(calls[0])
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def die() -> None:
    """End this process as the kernel's out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_before(owner: Any, name: str, *, call: int) -> None:
    """Let SIGKILL arrive right before the `call`-th call of a function of `owner`."""
    before(owner, name, lambda n: die() if n == call else None)


def fingerprint(run: Path) -> str:
    """Return the sha256 of weights, optimizer state, progress and data position of a run's end."""
    digest = hashlib.sha256()
    checkpoint = newest_checkpoint(run)
    for path in sorted(checkpoint.glob("*.safetensors")):
        digest.update(path.read_bytes())
    trainer = json.loads((checkpoint / "trainer.json").read_text())
    kept = {name: trainer[name] for name in ("progress", "data", "steps", "trainable")}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    return digest.hexdigest()
