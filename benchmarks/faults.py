"""What do faults cost? Kills at random times, kills while saving, and the stall of a save.

Two gloo ranks. A run whose ranks are killed at random times must come to the same weights, moments
and place in the data as an undisturbed one, by sha256. Beside it plain torchrun with restarts, with
DeepSpeed's own checkpoints and with transformers' Trainer.

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
    sys.path[0] = str(Path(__file__).parents[1])
os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1")

from benchmarks.common import Claim, claim, markdown_table, parse_arguments, report, say
from benchmarks.resilience import killed_run, saves, torchrun

_EVERY = killed_run.SAVE_EVERY
PEERS = {"torchrun": "deepspeed_worker.py", "trainer": "trainer_worker.py"}
COLUMNS = {
    "what": "what",
    "dist_ft": "dist_ft",
    "torchrun": "torchrun + DeepSpeed checkpoints",
    "trainer": "torchrun + HF Trainer",
}
# How often a node fails is the cluster's; that once in ten minutes is a bad one.
_KILL_EVERY_S = 600.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    options = parse_arguments(__doc__ or "", arguments)
    kills, save_kills, trials = (4, 8, 1) if options.quick else (20, 40, 5)
    rows, claims = _kills(kills)
    for peer, worker in PEERS.items():
        _add_peer(rows, peer, [torchrun.trial(worker, seed=seed) for seed in range(trials)])
    more_rows, more_claims = _saves(save_kills)
    rows += more_rows
    say(markdown_table(rows, columns=COLUMNS))
    return report(
        rows,
        claims=[*claims, *more_claims],
        packages=["torch", "deepspeed", "transformers"],
        options=options,
    )


def _kills(kills: int) -> tuple[list[dict[str, Any]], list[Claim]]:
    with tempfile.TemporaryDirectory() as name:
        recipe = killed_run.write_recipe(Path(name))
        oracle = killed_run.run(recipe, name="oracle", kills=0, seed=0)
        killed = killed_run.run(recipe, name="killed", kills=kills, seed=1)
    same = killed.code == 0 and killed.digest == oracle.digest
    survived = kills if same else len(killed.recoveries)
    found = killed.recoveries

    def median(name: str) -> float | None:
        return statistics.median(getattr(r, name) for r in found) if found else None

    first, lost = median("first_step_s"), median("steps_lost")
    step_s = oracle.seconds / killed_run.STEPS
    rows: list[dict[str, Any]] = [
        {"what": "SIGKILLs survived", "dist_ft": f"{survived} of {kills}"},
        {"what": "same end by sha256", "dist_ft": "yes" if same else "NO"},
        {"what": "s until detected, median", "dist_ft": _text(median("detect_s"))},
        {"what": "s until ranks run again", "dist_ft": _text(median("restart_s"))},
        {"what": "s until reloaded", "dist_ft": _text(median("reload_s"))},
        {"what": "s until the first new step", "dist_ft": _text(first)},
        {
            "what": f"steps lost (saved every {_EVERY}; peers {torchrun.SAVE_EVERY})",
            "dist_ft": _text(lost),
        },
        {"what": "goodput, a kill every 10 minutes", "dist_ft": _goodput(first, lost, step_s)},
        {
            "what": f"goodput measured, a kill every {killed.seconds / max(1, kills):.1f} s",
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


def _add_peer(rows: list[dict[str, Any]], peer: str, trials: Sequence[torchrun.Trial]) -> None:
    """Write a peer's column beside ours; what it takes counts only where it survived."""
    well = [t for t in trials if t.survived]

    def median(name: str) -> float | None:
        return statistics.median(getattr(t, name) for t in well) if well else None

    first, lost = median("first_step_s"), median("steps_lost")
    values = (
        f"{len(well)} of {len(trials)}", "", _text(median("detect_s")), _text(median("restart_s")),
        "", _text(first), _text(lost), _goodput(first, lost, median("step_s") or 0.0),
    )  # fmt: skip
    for row, value in zip(rows, values, strict=False):
        row[peer] = value


def _goodput(first_step_s: float | None, lost: float | None, step_s: float) -> str:
    """Return the share of ten minutes with one kill in which training gets on."""
    if first_step_s is None or lost is None:
        return "-"
    return f"{1 - (first_step_s + lost * step_s) / _KILL_EVERY_S:.1%}"


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _saves(kills: int) -> tuple[list[dict[str, Any]], list[Claim]]:
    ours = saves.kill_while_saving(saves.ours, saves.ours_is_usable, kills=kills)
    few = max(4, kills // 4)
    deepspeed = saves.kill_while_saving(saves.deepspeed_saves, saves.deepspeed_is_usable, kills=few)
    trainer = saves.kill_while_saving(saves.trainer_saves, saves.trainer_is_usable, kills=few)
    stall = saves.measure_stall(saves=5 if kills < 40 else 9)
    mib = stall.bytes / 2**20
    rows: list[dict[str, Any]] = [
        {
            "what": "kills during back-to-back saves that leave the one to resume from not whole",
            "dist_ft": f"{ours.unusable} of {ours.kills}",
            "torchrun": f"{deepspeed.unusable} of {deepspeed.kills}",
            "trainer": f"{trainer.unusable} of {trainer.kills}",
        },
        {
            "what": f"ms that training waits for a save of {mib:.0f} MiB, steps of "
            f"{stall.step_s * 1e3:.0f} ms",
            "dist_ft": f"{stall.stall_s * 1e3:.1f}",
            "torchrun": "all of it",
            "trainer": "all of it",
        },
        {
            "what": "ms that the steps beside it take longer in all",
            "dist_ft": f"{stall.slowdown_s * 1e3:.0f}",
        },
        {"what": "ms of the same save, synchronous", "dist_ft": f"{stall.synchronous_s * 1e3:.0f}"},
    ]
    return rows, [
        claim("kills that leave no checkpoint", value=ours.unusable, bound=0, direction="at most"),
        claim(
            "stall / synchronous save",
            value=stall.stall_s / stall.synchronous_s,
            bound=0.10,
            direction="at most",
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
