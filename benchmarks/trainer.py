"""Whole fine-tuning runs on two ranks, beside other trainers with the same layers frozen.

MiniLM-L6 learns to tell TREC questions, movie reviews and WNUT-16 tweets apart: real rows of three
kinds of length, 24 tokens on average. Every system sees the same rows, the same global batch, the
same learning rates and the same number of epochs. Two batches are reported: 64 rows a step, 32 a
rank, where what a step costs however few its rows weighs most; and 256, 128 a rank. transformers'
Trainer runs as it comes (fp32, rows in random order, padded to the longest), at its best settings
(bf16, grouped by length, fused AdamW) and with DeepSpeed ZeRO-2 besides; Lightning with the
finetuning-scheduler at the same best settings. dist_ft runs bf16 under ZeRO-2 with its defaults,
which switch the dropout of a frozen prefix off; the others leave it on. Seconds are those of the
training loop: no start, no tokenizing, no evaluation, but the building of our engine. A round runs
every system once with its own seed; systems without a claim run in the first round only.
"""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository is not on the path
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.common import Claim, claim, markdown_table, parse_arguments, report, say
from benchmarks.ranks import on_ranks
from benchmarks.training import lightning_scheduler
from benchmarks.training.hf_trainer import SETTINGS, train_trainer
from benchmarks.training.own_run import prepare_shards, train_own, write_recipe
from benchmarks.training.workload import (
    BLOCKS,
    RANKS,
    Encoded,
    Job,
    Outcome,
    encode,
    write_mixed,
)

OWN = "dist_ft"
DEPTHS = (0, 3, 5)
# Rows of a step: rows to train on. Steps are 30 and 15 in 5 epochs.
BATCHES = {64: 384, 256: 768}
# What has a claim, and so runs in every round.
CLAIMED = {(d, s) for d in DEPTHS for s in (OWN, "Trainer")} | {(0, "Trainer, tuned")}
# Deviations over the seeds by which a mean loss may lie above another's and count as equal.
NOISE = 2.0
COLUMNS = {
    "batch": "rows a step",
    "depth": f"frozen blocks of {BLOCKS}",
    "system": "system",
    "runs": "runs",
    "seconds": "seconds",
    "step_s": "seconds a step",
    "times": "dist_ft is quicker by",
    "loss": "validation loss",
    "deviation": "its deviation over seeds",
    "accuracy": "accuracy",
}
Found = dict[tuple[int, str], list[Outcome]]


def systems() -> list[str]:
    """Return the systems, ours first."""
    peers = [lightning_scheduler.NAME] if lightning_scheduler.is_installed() else []
    return [OWN, *SETTINGS, *peers]


def run_system(system: str, job: Job, data: Encoded, *, recipe: Path) -> Outcome:
    """Return what one run took."""
    if system == OWN:
        return on_ranks(train_own, job, recipe)
    if system == lightning_scheduler.NAME:
        return on_ranks(lightning_scheduler.train_lightning, job, data)
    return on_ranks(functools.partial(train_trainer, setting=system), job, data)


def measure(folder: Path, *, batch: int, rounds: int, epochs: int) -> Found:
    """Return all outcomes of one batch, in the order of the rounds."""
    data = encode(folder)
    found: Found = {}
    for number in range(rounds):
        for depth in DEPTHS:
            job = Job(folder, depth, epochs, seed=number, micro_batch=batch // RANKS)
            recipe = write_recipe(job, name=f"d{depth}-{number}")
            if not found:
                prepare_shards(recipe)
            for system in systems():
                if number and (depth, system) not in CLAIMED:
                    continue
                one = run_system(system, job, data, recipe=recipe)
                found.setdefault((depth, system), []).append(one)
                place = f"{batch} rows, round {number + 1}: {depth} frozen, {system}"
                say(f"{place}: {one.seconds:.1f} s")
    return found


def rows_of(
    found: Mapping[tuple[int, str], Sequence[Outcome]], *, batch: int
) -> list[dict[str, Any]]:
    """Return the table: medians over rounds, ratios within a round."""
    rows: list[dict[str, Any]] = []
    for (depth, system), each in found.items():
        ours = found[depth, OWN][: len(each)]
        losses = [e.score.loss for e in each]
        rows.append(
            {
                "batch": batch,
                "depth": depth,
                "system": system,
                "runs": len(each),
                "seconds": statistics.median(e.seconds for e in each),
                "step_s": statistics.median(e.seconds / e.steps for e in each),
                "times": statistics.median(
                    e.seconds / o.seconds for e, o in zip(each, ours, strict=True)
                ),
                "loss": statistics.mean(losses),
                "deviation": statistics.stdev(losses) if len(each) > 1 else None,
                "accuracy": statistics.mean(e.score.accuracy for e in each),
            }
        )
    return rows


def excess(ours: Mapping[str, Any], peer: Mapping[str, Any]) -> float | None:
    """Return how far our mean loss lies above a peer's, in standard deviations over the seeds."""
    if ours["deviation"] is None or peer["deviation"] is None:
        return None
    noise = max(1e-9, (ours["deviation"] ** 2 + peer["deviation"] ** 2) ** 0.5)
    return (ours["loss"] - peer["loss"]) / noise


def claims_of(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Return what must hold of each batch."""
    batches = dict.fromkeys(row["batch"] for row in rows)
    return [
        one for batch in batches for one in _claims_of([r for r in rows if r["batch"] == batch])
    ]


def _claims_of(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    batch = rows[0]["batch"]
    by = {(r["depth"], r["system"]): r for r in rows}
    speed: Callable[[int, str], float] = lambda depth, system: by[depth, system]["times"]  # noqa: E731
    wanted = (
        ("all layers train, x Trainer", speed(0, "Trainer"), 3.0),
        ("all layers train, x Trainer tuned", speed(0, "Trainer, tuned"), 1.5),
        ("3 of 6 frozen, x Trainer", speed(3, "Trainer"), 4.0),
        ("5 of 6 frozen, x Trainer", speed(5, "Trainer"), 10.0),
    )
    claims = [
        claim(f"{batch} rows, {n}", value=v, bound=b, direction="at least") for n, v, b in wanted
    ]
    for depth in DEPTHS:
        name = f"{batch} rows, {depth} of 6 frozen, validation loss above Trainer's, in deviations"
        value = excess(by[depth, OWN], by[depth, "Trainer"])
        claims.append(claim(name, value=value, bound=NOISE, direction="at most"))
    return claims


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    options = parse_arguments(__doc__ or "", arguments)
    rounds, epochs, share = (1, 2, 4) if options.quick else (5, 5, 1)
    table: list[dict[str, Any]] = []
    for batch, rows in BATCHES.items():
        with tempfile.TemporaryDirectory() as name:
            write_mixed(Path(name), rows=rows // share)
            found = measure(Path(name), batch=batch, rounds=rounds, epochs=epochs)
        table += rows_of(found, batch=batch)
    say(markdown_table(table, columns=COLUMNS))
    if not lightning_scheduler.is_installed():
        say(f"{lightning_scheduler.NAME}: not installed, pip install 'dist-ft[bench]'")
    packages = (
        "torch", "deepspeed", "transformers", "accelerate", "lightning", "finetuning-scheduler",
        "dist-ft",
    )  # fmt: skip
    return report(table, claims=claims_of(table), packages=packages, options=options)


if __name__ == "__main__":
    sys.exit(main())
