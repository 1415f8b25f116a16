"""How long until a model is good enough: a gradual schedule beside full and frozen fine-tuning.

MiniLM-L6 on two ranks, TREC questions (6 classes), SMS, and the sentiment of movie and product
reviews, editorials and tweets (2 classes each), three seeds. The target is set by transformers'
Trainer as it comes, all layers training: the mean of its last accuracies less one standard error of
an accuracy of that many validation rows. dist_ft follows a gradual schedule (heads, then the
topmost two blocks, too) in bf16 under ZeRO-2 with the activation cache. The Trainer runs as it
comes and at its best settings, all layers training, and with the same layers frozen as ours has
frozen on average over its run. Every system learns at the rate that was best for it of a few
(`RATES`); rates and schedule were chosen on rows of TREC and of the movie reviews, and more
schedules of ours were tried than rates of a peer. Time is that of the training loop until the first
score that reaches the target; scores are taken as often for all, and are not counted. A run that
never reaches it has no time, and counts as longer than any other.
"""

from __future__ import annotations

import argparse
import functools
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository is not on the path
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.common import Claim, claim, markdown_table, parse_arguments, report, say
from benchmarks.ranks import on_ranks
from benchmarks.training.hf_trainer import train_trainer
from benchmarks.training.own_run import prepare_shards, train_own, write_recipe
from benchmarks.training.workload import (
    BLOCKS,
    GLOBAL_BATCH,
    Encoded,
    Job,
    Outcome,
    encode,
    unique_texts,
    write_splits,
)

OWN = "dist_ft, gradual"
SETS = (
    "trec", "movie_sentiment", "sms_spam", "amazon_sentiment", "news_sentiment", "tweet_sentiment",
)  # fmt: skip
# Liu et al. 2021, "AutoFreeze", abstract: one GPU, BERT-base, with caching. Quoted, not measured.
AUTOFREEZE = 2.55
# Blocks that ours has frozen on average over its schedule (4.1), and the peers always.
FROZEN = 4
# Peak learning rates; see the module's comment.
RATES = {"full": 2e-4, "frozen": 1e-3, "gradual": 1e-3}


@dataclass(frozen=True)
class System:
    """A peer: a setting of the Trainer and how many blocks it freezes."""

    setting: str
    depth: int

    @property
    def name(self) -> str:
        """As in the table."""
        return f"{self.setting}, {f'{self.depth} of {BLOCKS} frozen' if self.depth else 'full'}"

    @property
    def rate(self) -> float:
        """Its peak learning rate."""
        return RATES["frozen" if self.depth else "full"]


PEERS = tuple(System(s, d) for s in ("Trainer", "Trainer, tuned") for d in (0, FROZEN))
REFERENCE = PEERS[0]
COLUMNS = {
    "set": "data",
    "system": "system",
    "seconds": "seconds to target",
    "reached": "seeds that reach it",
    "times": "dist_ft is quicker by",
    "accuracy": "last accuracy",
    "whole_s": "seconds of the whole run",
    "target": "target",
}


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    train: int
    validation: int
    epochs: int
    seeds: int
    scores: int

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return self.epochs * math.ceil(self.train / GLOBAL_BATCH)


FULL, QUICK = Size(960, 400, 3, 3, 15), Size(128, 64, 1, 1, 2)


def write_set(folder: Path, path: str, *, size: Size) -> None:
    """Write distinct rows of a packaged set, drawn once."""
    labels = unique_texts(path, base=folder)
    chosen = random.Random(0).sample(sorted(labels), size.train + size.validation)
    rows = [{"text": text, "label": labels[text]} for text in chosen]
    write_splits(folder, train=rows[: size.train], validation=rows[size.train :])


def target_of(accuracies: Sequence[float], *, rows: int) -> float:
    """Return the mean accuracy less one standard error of an accuracy of so many rows."""
    mean = statistics.mean(accuracies)
    return mean - math.sqrt(mean * (1 - mean) / rows)


def seconds_to(curve: Sequence[tuple[float, float]], *, target: float) -> float:
    """Return the time of the first score that reaches the target; infinity if none does."""
    return next((seconds for seconds, accuracy in curve if accuracy >= target), math.inf)


def gradual(size: Size) -> dict[str, Any]:
    """Return the schedule: heads for a twentieth of the run, then the topmost two blocks, too.

    The mean is 4.1 frozen blocks.
    """
    start = max(1, round(size.steps * 0.05))
    return {
        "policy": "gradual",
        "groups_per_phase": 2,
        "at": [f"{start}step"],
        "switch": "in_place",
    }


def measure(folder: Path, *, size: Size) -> dict[str, list[Outcome]]:
    """Return every system's outcomes on the rows of a folder, a round for each seed."""
    data: Encoded = encode(folder)
    every = max(1, size.steps // size.scores)
    found: dict[str, list[Outcome]] = {}
    for seed in range(size.seeds):
        job = Job(folder, 0, size.epochs, lr=RATES["gradual"], seed=seed, score_every=every)
        recipe = write_recipe(job, name=f"gradual-{seed}", freezing=gradual(size))
        if not seed:
            prepare_shards(recipe)
        outcomes = {OWN: on_ranks(train_own, job, recipe)}
        for peer in PEERS:
            peer_job = Job(folder, peer.depth, size.epochs, peer.rate, seed, every)
            call = functools.partial(train_trainer, setting=peer.setting)
            outcomes[peer.name] = on_ranks(call, peer_job, data)
        for name, outcome in outcomes.items():
            found.setdefault(name, []).append(outcome)
            say(f"{folder.name}, seed {seed}, {name}: {outcome.seconds:.1f} s, "
                f"accuracy {outcome.score.accuracy:.3f}")  # fmt: skip
    return found


def rows_of(
    name: str, found: Mapping[str, Sequence[Outcome]], *, rows: int
) -> list[dict[str, Any]]:
    """Return a set's table: medians over seeds, ratios within a seed."""
    target = target_of([o.score.accuracy for o in found[REFERENCE.name]], rows=rows)
    times = {
        system: [seconds_to(o.curve, target=target) for o in each] for system, each in found.items()
    }
    return [
        {
            "set": name,
            "system": system,
            "seconds": statistics.median(times[system]),
            "reached": sum(math.isfinite(t) for t in times[system]),
            "times": ratio(times[system], times[OWN]),
            "accuracy": statistics.mean(o.score.accuracy for o in each),
            "whole_s": statistics.median(o.seconds for o in each),
            "target": target,
        }
        for system, each in found.items()
    ]


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float | None:
    """Return the median ratio over seeds; None where ours never comes there."""
    if not all(math.isfinite(t) for t in ours):
        return None
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))


def claims_of(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Return what must hold on each set."""
    by = {(r["set"], r["system"]): r for r in rows}
    return [
        claim(
            f"{name}, to the target, x {peer.name}",
            value=by[name, peer.name]["times"],
            bound=6.0 if peer.setting == "Trainer" else 3.0,
            direction="at least",
        )
        for name in dict.fromkeys(r["set"] for r in rows)
        for peer in PEERS
    ]


def _add_sets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sets",
        nargs="+",
        choices=SETS,
        default=SETS,
        help="of these; each takes about 15 minutes",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    options = parse_arguments(__doc__ or "", arguments, more=_add_sets)
    size, sets = (QUICK, options.sets[:1]) if options.quick else (FULL, options.sets)
    table: list[dict[str, Any]] = []
    for name in sets:
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root) / name
            folder.mkdir()
            write_set(folder, f"package:{name}", size=size)
            table += rows_of(name, measure(folder, size=size), rows=size.validation)
    say(markdown_table(table, columns=COLUMNS))
    say(f"AutoFreeze, quoted and not measured here (one GPU, BERT-base, x full): {AUTOFREEZE}")
    packages = ("torch", "deepspeed", "transformers", "accelerate", "dist-ft")
    return report(table, claims=claims_of(table), packages=packages, options=options)


if __name__ == "__main__":
    sys.exit(main())
