"""Do frozen layers stay, and do thawed layers train? Side by side, on 2 gloo ranks.

The same schedule, data and tiny transformer run through raw DeepSpeed, torch DDP, Lightning,
finetuning-scheduler and dist_ft, and are compared with plain torch in one process. Peers that are
not installed get a row that says so (`pip install 'dist-ft[bench]'`).

    python benchmarks/freeze_correctness.py [--quick] [--json FILE] [--check]
"""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository is not on the path
    sys.path[0] = str(Path(__file__).parents[1])
# Read by torch and DeepSpeed when they are imported.
os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1")

from benchmarks.common import Claim, claim, markdown_table, parse_arguments, report, say
from benchmarks.freezing import deepspeed_raw, dist_ft_engine, lightning_peers, tiny, torch_ddp
from benchmarks.freezing.outcome import Case, Outcome, Weights, measure, run_cases
from benchmarks.freezing.tiny import Schedule

PACKAGES = ("torch", "deepspeed", "numpy", "dist-ft", *lightning_peers.MODULES)
FP32_BOUND = 1e-5  # summation order over 2 ranks; measured differences are 1e-7 to 3e-6
COLUMNS = {
    "system": "system",
    "setting": "setting",
    "precision": "precision",
    "drift": "drift of frozen",
    "thawed": "movement of thawed",
    "disagreement": "ranks disagree by",
    "difference": "difference to plain torch",
    "note": "note",
}
HEAD_COLUMNS = COLUMNS | {"drift": "drift of the inactive head"}
del HEAD_COLUMNS["thawed"]


@dataclass(frozen=True)
class Family:
    """Cases that share a process, their imports and the answer that is expected of them.

    Attributes:
        cases: What to run.
        load: Imports what they need.
        schedules: What each rank was asked to do; rank 0's is what the reference does.
        tasks: Heads of the model.
        package: Optional package that the cases need.
    """

    cases: list[Case]
    load: Callable[[], None]
    schedules: tuple[Schedule, ...]
    tasks: tuple[str, ...] = ("a",)
    package: str | None = None


def gradual_families(*, quick: bool) -> list[Family]:
    """Return every system on the schedule that thaws twice, freezes again and thaws again."""
    full = (tiny.THAW_AND_FREEZE,)
    precisions = ("fp32",) if quick else ("fp32", "bf16")
    peers, deepspeed = lightning_peers, deepspeed_raw
    return [
        Family(deepspeed.schedule_cases(precisions, quick=quick), deepspeed.load, full),
        Family(torch_ddp.schedule_cases(), torch_ddp.load, full),
        Family(peers.lightning_cases(), peers.load_lightning, full, package="lightning"),
        Family(
            peers.scheduler_cases(),
            peers.load_scheduler,
            (tiny.THAW,),
            package="finetuning-scheduler",
        ),
        Family(dist_ft_engine.schedule_cases(precisions), deepspeed.load, full),
    ]


def block_families(*, quick: bool) -> list[Family]:
    """Return LISA's callback and dist_ft on random blocks."""
    lisa = deepspeed_raw.lisa_cases(quick=quick)
    families = [
        Family(
            [case for case in lisa if name in case.labels["system"]],
            deepspeed_raw.load,
            tuple(
                tiny.block_schedule(deepspeed_raw.numpy_draws(seed(rank)))
                for rank in range(tiny.WORLD_SIZE)
            ),
        )
        for seed, name in deepspeed_raw.SEEDS.items()
    ]
    own = tiny.block_schedule(dist_ft_engine.block_draws())
    return [
        *families,
        Family(dist_ft_engine.block_cases(quick=quick), deepspeed_raw.load, (own,)),
    ]


def head_families(*, quick: bool) -> list[Family]:
    """Return raw DeepSpeed and dist_ft with two heads, one of which runs in a step."""
    cases = [*deepspeed_raw.head_cases(), *dist_ft_engine.head_cases(quick=quick)]
    return [Family(cases, deepspeed_raw.load, (tiny.HEADS,), tasks=tiny.TASKS)]


def run(families: Sequence[Family]) -> list[list[dict[str, Any]]]:
    """Return the table's rows of each family; families with the same imports share a process."""
    done: list[list[dict[str, Any]]] = [_missing(family) for family in families]
    for load in dict.fromkeys(family.load for family in families):
        waiting = [i for i, family in enumerate(families) if family.load is load and not done[i]]
        outcomes = run_cases([case for i in waiting for case in families[i].cases], load=load)
        for i in waiting:
            count = len(families[i].cases)
            done[i] = _rows(families[i], outcomes[:count])
            outcomes = outcomes[count:]
    return done


def _missing(family: Family) -> list[dict[str, Any]]:
    if not family.package or lightning_peers.installed(family.package):
        return []
    note = f"not installed: pip install 'dist-ft[bench]' brings {family.package}"
    return [{**case.labels, "note": note} for case in family.cases]


def _rows(family: Family, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    expected = tiny.reference(family.schedules[0], tasks=family.tasks)
    # Ranks that were asked for different things must at least keep still what none of them trains.
    idle = [
        frozenset.intersection(*(span.idle for span in spans))
        for spans in zip(*family.schedules, strict=True)
    ]
    return [
        {**case.labels, **_row(outcome, idle=idle, expected=expected)}
        for case, outcome in zip(family.cases, outcomes, strict=True)
    ]


def _row(
    outcome: Outcome, *, idle: Sequence[frozenset[str]], expected: Sequence[Weights]
) -> dict[str, Any]:
    row: dict[str, Any] = {"note": outcome.note, "seconds": round(outcome.seconds, 2)}
    if outcome.failed:
        return row | {"note": f"died: {outcome.note}"}
    if all(outcome.snapshots):
        row |= asdict(
            measure(outcome.snapshots, idle=idle, expected=expected, group_of=tiny.group_of)
        )
    return row


def reference_row() -> dict[str, Any]:
    """Return how far plain torch moves on the schedule: the scale of the other numbers."""
    weights = tiny.reference(tiny.THAW_AND_FREEZE, tasks=("a",))
    measures = measure(
        [weights],
        idle=[span.idle for span in tiny.THAW_AND_FREEZE],
        expected=weights,
        group_of=tiny.group_of,
    )
    labels = {"system": "plain torch (the reference)", "setting": "1 process", "precision": "fp32"}
    return {**labels, **asdict(measures), "note": ""}


def make_claims(tables: dict[str, list[dict[str, Any]]]) -> list[Claim]:
    """Return what dist_ft promises, over all of its rows."""
    own = {
        name: [row for row in rows if row["system"].startswith("dist_ft,")]
        for name, rows in tables.items()
    }
    engine_rows = [row for rows in own.values() for row in rows if "seconds" in row]
    planted = [row for row in engine_rows if row["setting"] == "any"]
    engine_rows = [row for row in engine_rows if row not in planted]
    moved = [row for name in ("gradual", "blocks") for row in own[name] if row not in planted]
    fp32 = [row for row in engine_rows if row["precision"] == "fp32"]
    named = [row for row in planted if row["note"].startswith("DisagreementError: ranks disagree")]
    return [
        claim(
            "dist_ft: drift of frozen layers",
            value=largest(moved, "drift"),
            bound=0.0,
            direction="at most",
        ),
        claim(
            "dist_ft: drift of the inactive head",
            value=largest(own["heads"], "drift"),
            bound=0.0,
            direction="at most",
        ),
        claim(
            "dist_ft: difference of all weights, thawed ones included, to plain torch (fp32)",
            value=largest(fp32, "difference"),
            bound=FP32_BOUND,
            direction="at most",
        ),
        claim(
            "dist_ft: disagreement between ranks",
            value=largest(engine_rows, "disagreement"),
            bound=0.0,
            direction="at most",
        ),
        claim(
            "dist_ft: runs with masks made to differ that are refused by name",
            value=len(named),
            bound=1,
            direction="at least",
        ),
    ]


def largest(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """Return the largest value of a column; None if there is no row or one that lacks it."""
    values = [row.get(key) for row in rows]
    present = [value for value in values if value is not None]
    return max(present) if present and len(present) == len(values) else None


TABLES: dict[str, tuple[str, Callable[..., list[Family]], dict[str, str]]] = {
    "gradual": (
        "Thaw twice, freeze again, thaw again (30 AdamW steps, lr 1e-2, weight decay 0.1)",
        gradual_families,
        COLUMNS,
    ),
    "blocks": (
        "One random block at a time (LISA), a new one every 4 of 24 steps",
        block_families,
        COLUMNS,
    ),
    "heads": (
        "Two heads: 6 round-robin steps, then 20 steps of one head",
        head_families,
        HEAD_COLUMNS,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    options = parse_arguments(__doc__ or "", arguments)
    began = time.monotonic()
    families = {name: make(quick=options.quick) for name, (_, make, _) in TABLES.items()}
    rows = iter(run([family for some in families.values() for family in some]))
    tables: dict[str, list[dict[str, Any]]] = {}
    for name, (title, _, columns) in TABLES.items():
        found = [row for _ in families[name] for row in next(rows)]
        tables[name] = [reference_row(), *found] if name == "gradual" else found
        short = [row | {"note": textwrap.shorten(row["note"], 100)} for row in tables[name]]
        say(f"\n{title}\n\n{markdown_table(short, columns=columns)}")
    say("\nLargest absolute values of any element; the reference is fp32 for bf16 rows too.")
    say(f"Took {time.monotonic() - began:.0f} s.")
    flat = [{"table": name, **row} for name, rows in tables.items() for row in rows]
    return report(flat, claims=make_claims(tables), packages=PACKAGES, options=options)


if __name__ == "__main__":
    sys.exit(main())
