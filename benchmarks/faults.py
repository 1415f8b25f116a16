"""What do faults cost? Kills at random times, kills while saving, and the stall of a save.

Two gloo ranks. A run whose ranks are killed at random times must come to the same weights, moments
and place in the data as an undisturbed one, by sha256. Beside it plain torchrun with DeepSpeed's
own checkpoints.

    python benchmarks/faults.py [--quick] [--json FILE] [--check]
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository is not on the path
    sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1")

from benchmarks.common import Claim, claim, markdown_table, parse_arguments, report, say
from benchmarks.resilience import killed_run, saves, torchrun_deepspeed

_EVERY = killed_run.SAVE_EVERY
COLUMNS = {"what": "what", "dist_ft": "dist_ft", "torchrun": "torchrun + DeepSpeed checkpoints"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    options = parse_arguments(__doc__ or "", arguments)
    kills, save_kills, trials = (4, 8, 1) if options.quick else (20, 40, 5)
    rows, claims = _kills(kills)
    peer = [torchrun_deepspeed.trial(seed=seed) for seed in range(trials)]
    again = [seconds for _, seconds in peer if seconds is not None]
    rows[0]["torchrun"] = f"{sum(ok for ok, _ in peer)} of {trials}"
    rows[4]["torchrun"] = f"{statistics.median(again):.1f}" if again else "-"
    more_rows, more_claims = _saves(save_kills)
    rows += more_rows
    say(markdown_table(rows, columns=COLUMNS))
    return report(
        rows, claims=[*claims, *more_claims], packages=["torch", "deepspeed"], options=options
    )


def _kills(kills: int) -> tuple[list[dict[str, Any]], list[Claim]]:
    with tempfile.TemporaryDirectory() as name:
        recipe = killed_run.write_recipe(Path(name))
        oracle = killed_run.run(recipe, name="oracle", kills=0, seed=0)
        killed = killed_run.run(recipe, name="killed", kills=kills, seed=1)
    same = killed.code == 0 and killed.digest == oracle.digest
    survived = kills if same else len(killed.recoveries)
    found = killed.recoveries

    def median(name: str) -> str:
        return f"{statistics.median(getattr(r, name) for r in found):.2f}" if found else "-"

    rows: list[dict[str, Any]] = [
        {"what": "SIGKILLs survived", "dist_ft": f"{survived} of {kills}"},
        {"what": "s until detected, median", "dist_ft": median("detect_s")},
        {"what": "s until ranks run again", "dist_ft": median("restart_s")},
        {"what": "s until reloaded", "dist_ft": median("reload_s")},
        {"what": "s until the first new step", "dist_ft": median("first_step_s")},
        {
            "what": f"steps lost (saved every {_EVERY})",
            "dist_ft": median("steps_lost"),
        },
        {"what": "same end by sha256", "dist_ft": "yes" if same else "NO"},
        {
            "what": f"goodput with a kill every {killed.seconds / max(1, kills):.1f} s",
            "dist_ft": f"{oracle.seconds / killed.seconds:.0%}",
        },
    ]
    most_lost = max((r.steps_lost for r in found), default=None)
    # The newest checkpoint may still be being written.
    most = 2 * _EVERY
    return rows, [
        claim(
            "kills survived with the same end", value=survived, bound=kills, direction="at least"
        ),
        claim("most steps lost", value=most_lost, bound=most, direction="at most"),
    ]


def _saves(kills: int) -> tuple[list[dict[str, Any]], list[Claim]]:
    ours = saves.kill_while_saving(saves.ours, saves.ours_is_usable, kills=kills)
    theirs = saves.kill_while_saving(
        saves.deepspeed_saves, saves.deepspeed_is_usable, kills=max(4, kills // 4)
    )
    stall = saves.measure_stall(saves=9)
    share = stall.stall_s / stall.synchronous_s
    mib = stall.bytes / 2**20
    rows: list[dict[str, Any]] = [
        {
            "what": "kills during back-to-back saves that leave nothing usable",
            "dist_ft": f"{ours.unusable} of {ours.kills}",
            "torchrun": f"{theirs.unusable} of {theirs.kills}",
        },
        {
            "what": f"ms that a save of {mib:.0f} MiB stalls training",
            "dist_ft": f"{stall.stall_s * 1e3:.0f}",
        },
        {"what": "ms of the same save, synchronous", "dist_ft": f"{stall.synchronous_s * 1e3:.0f}"},
    ]
    return rows, [
        claim("kills that leave no checkpoint", value=ours.unusable, bound=0, direction="at most"),
        claim("stall / synchronous save", value=share, bound=0.10, direction="at most"),
    ]


if __name__ == "__main__":
    sys.exit(main())
