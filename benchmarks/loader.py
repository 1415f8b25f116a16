"""What does loading cost, how much of a batch is padding, and how long does resuming take?

All loaders deliver the same thing from the same 200,000 random sequences with the lengths of real
text (log-normal, mean 59, at most 512 tokens): batches of 32 with input_ids, attention_mask and
labels, padded to the longest. Costs are CPU microseconds per sample (user and system, threads and
worker processes included), as wall-clock times swing on a shared machine. Each loader has a process
of its own; all take turns, and loaders are compared within each turn.

    python benchmarks/loader.py [--quick] [--json FILE] [--check]

Peers that aren't installed are left out with the reason: torchdata (StatefulDataLoader),
mosaicml-streaming.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

if not __package__:  # run as a file: the repository is not on the path
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.common import Claim, claim, markdown_table, parse_arguments, report, say
from benchmarks.loading.data import BATCH, STEP, step_loader, text_lengths, write_data
from benchmarks.loading.loaders import LOADERS, OURS, hf_dataset, pad_torch
from benchmarks.loading.rounds import Cost, in_rounds
from dist_ft.data.loader import LengthPlan
from dist_ft.data.packing import filled_share, first_fit
from dist_ft.data.planning import deal, plan_step
from dist_ft.data.shards import ShardedDataset

PACKAGES = (
    "dist-ft",
    "torch",
    "numpy",
    "pyarrow",
    "datasets",
    "transformers",
    "torchdata",
    "mosaicml-streaming",
)
COLUMNS = {
    "loader": "loader",
    "cpu_us": "CPU us per sample, median",
    "cpu_us_least": "least",
    "times_ours": "times ours, median of rounds",
    "times_ours_least": "least",
    "samples_per_s": "samples/s, best",
}
_RANKS, _EACH = 8, 4
_AT_8 = f"useful tokens at {_RANKS} ranks with {_EACH} micro-batches"


def table_of(costs: Mapping[str, Sequence[Cost]]) -> list[dict[str, Any]]:
    """Returns a row for each loader; ratios are of the same round."""
    rows = []
    for name, rounds in costs.items():
        cpu = [1e6 * cost.cpu_s for cost in rounds]
        ratios = [c.cpu_s / own.cpu_s for c, own in zip(rounds, costs[OURS], strict=True)]
        rows.append({
            "loader": name,
            "cpu_us": statistics.median(cpu),
            "cpu_us_least": min(cpu),
            "times_ours": statistics.median(ratios),
            "times_ours_least": min(ratios),
            "samples_per_s": round(1 / min(cost.wall_s for cost in rounds)),
        })  # fmt: skip
    return rows


def useful_shares(lengths: np.ndarray) -> dict[str, float]:
    """Returns shares of useful tokens by layout.

    Of a layout that can be run, the places of all ranks are counted until the slowest is done with
    the step: padding and waiting. "Packed" is what a run with `packed` does: rows follow each other
    without padding in micro-batches of about equal cost. Bins have a fixed number of places, as
    packed rows of other trainers do; how full they get depends on how many rows there are to choose
    from.
    """
    steps = [
        lengths[i : i + STEP] for i in range(0, min(len(lengths), 200 * STEP) - STEP + 1, STEP)
    ]
    bins = [first_fit(own, capacity=512) for own in steps]
    return {
        "in order": _mean(_share_in_order(own) for own in steps),
        "planned": _mean(_share_planned(own, plan=LengthPlan()) for own in steps),
        "packed": _mean(_share_planned(own, plan=LengthPlan(packed=True)) for own in steps),
        "bins of 512, first fit within a step": _mean(
            filled_share(own, bins=found, capacity=512)
            for own, found in zip(steps, bins, strict=True)
        ),
        "bins of 512, first fit over all rows": filled_share(
            lengths, bins=first_fit(lengths, capacity=512), capacity=512
        ),
    }


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _share_in_order(lengths: np.ndarray) -> float:
    rectangle = lengths.reshape(_RANKS, _EACH, -1)
    slowest = (rectangle.max(axis=2) * rectangle.shape[2]).sum(axis=1).max()
    return lengths.sum() / (_RANKS * slowest)


def _share_planned(lengths: np.ndarray, *, plan: LengthPlan) -> float:
    planned = plan_step(lengths, micro_batches=_RANKS * _EACH, plan=plan)
    places = [
        int(lengths[members].sum()) if plan.packed else len(members) * int(lengths[members].max())
        for members in planned.micro_batches
    ]
    ranks = deal(planned.costs, world_size=_RANKS)
    slowest = max(sum(places[n] for n in rank if n is not None) for rank in ranks)
    return lengths.sum() / (_RANKS * slowest)


def resume_times(data: ShardedDataset) -> dict[str, float]:
    """Returns seconds from nothing to the first batch at 90 % of an epoch."""
    from accelerate import skip_first_batches

    batches = len(data) * 9 // (10 * BATCH)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        steps = step_loader(data).iterate(batches * BATCH // STEP)
        next(steps)
        times.append(time.perf_counter() - started)
        steps.close()
    dataset = hf_dataset(data).with_format("torch")
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=BATCH, shuffle=True, collate_fn=pad_torch
    )
    started = time.perf_counter()
    next(iter(skip_first_batches(loader, batches)))
    return {
        "dist_ft (slowest of 3)": max(times),
        "datasets, accelerate's skip_first_batches": time.perf_counter() - started,
    }


def claims_of(
    rows: Sequence[Mapping[str, Any]], *, shares: Mapping[str, float], times: Mapping[str, float]
) -> list[Claim]:
    """Returns what the results are to show."""
    ratios = {row["loader"]: row["times_ours"] for row in rows}
    peers = {"datasets + DataCollatorWithPadding": 20, "mosaicml-streaming": 10}
    claims = [
        claim(f"CPU of {name} over ours", value=ratios[name], bound=bound, direction="at least")
        for name, bound in peers.items()
        if name in ratios
    ]
    resumed = times["dist_ft (slowest of 3)"]
    return [
        *claims,
        claim(f"{_AT_8}, planned", value=shares["planned"], bound=0.9, direction="at least"),
        claim(f"{_AT_8}, in order", value=shares["in order"], bound=0.3, direction="at most"),
        claim(f"{_AT_8}, packed", value=shares["packed"], bound=0.99, direction="at least"),
        claim("seconds to resume", value=resumed, bound=0.05, direction="at most"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    options = parse_arguments(__doc__ or "", arguments)
    torch.set_num_threads(1)
    lengths = text_lengths(20_000 if options.quick else 200_000)
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder) / "shards", lengths=lengths)
        rounds, batches = (5, 150) if options.quick else (11, 400)
        makers = {name: partial(make, data) for name, make in LOADERS.items()}
        costs, missing = in_rounds(makers, rounds=rounds, batches=batches)
        times = resume_times(data)
    rows = table_of(costs)
    say(markdown_table(rows, columns=COLUMNS))
    for name, reason in missing.items():
        say(f"{name}: left out, as it is not installed ({reason})")
    shares = useful_shares(lengths)
    for name, share in shares.items():
        say(f"useful tokens, {name}: {share:.1%}")
    for name, seconds in times.items():
        say(f"to the first batch at 90 % of an epoch, {name}: {1000 * seconds:.1f} ms")
    return report(
        [*rows, {"useful_share": shares}, {"resume_s": times}],
        claims=claims_of(rows, shares=shares, times=times),
        packages=PACKAGES,
        options=options,
    )


if __name__ == "__main__":
    sys.exit(main())
