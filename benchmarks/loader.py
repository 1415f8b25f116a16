"""What does loading cost, how much of a batch is padding, and how long does resuming take?

All loaders deliver the same thing from the same 200,000 random sequences with the lengths of real
text (log-normal, mean 59, at most 512 tokens): batches of 32 with input_ids, attention_mask and
labels, padded to the longest. Costs are CPU microseconds per sample (user and system, threads and
worker processes included), as wall-clock times swing on a shared machine.

    python benchmarks/loader.py [--quick] [--json FILE] [--check]

Peers that aren't installed are left out with the reason: torchdata (StatefulDataLoader),
mosaicml-streaming.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pyarrow as pa
import torch

if not __package__:  # run as a file: the repository is not on the path
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import Claim, claim, markdown_table, parse_arguments, report, say
from dist_ft.data.collate import CollateSpec
from dist_ft.data.loader import BatchPlan, LengthPlan, StepLoader
from dist_ft.data.packing import filled_share, first_fit
from dist_ft.data.planning import deal, plan_step
from dist_ft.data.sampling import RoundRobin
from dist_ft.data.schema import shard_schema
from dist_ft.data.shards import Manifest, ShardedDataset, ShardWriter, write_manifest

BATCH = 32
STEP = 256
# Quick loaders deliver more batches, until this is over.
LEAST_SECONDS = 0.3
SPEC = CollateSpec(
    ragged={"input_ids": 0},
    scalar=("labels",),
    inputs=("input_ids", "attention_mask"),
    targets=("labels",),
)
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
    "times_ours": "least, times ours",
    "samples_per_s": "samples/s, best",
}


@dataclass(frozen=True)
class Measured:
    """What a loader costs: median and least CPU microseconds per sample, best samples a second."""

    loader: str
    cpu_us: float
    cpu_us_least: float
    samples_per_s: int


def text_lengths(rows: int, *, seed: int = 0) -> np.ndarray:
    """Returns lengths as in real text, int64 [rows]: mean 59, median 43, at most 512 tokens."""
    rng = np.random.default_rng(seed)
    return np.clip(np.round(rng.lognormal(np.log(43), 0.8, rows)), 1, 512).astype(np.int64)


def write_data(folder: Path, *, lengths: np.ndarray) -> ShardedDataset:
    """Writes random sequences as shards and opens them."""
    folder.mkdir()
    schema = shard_schema(pa.schema([pa.field("labels", pa.int32())]))
    # About 25,000 rows, as in the shards that the other loaders read.
    writer = ShardWriter(folder, schema=schema, target_bytes=6 * 2**20)
    rng = np.random.default_rng(1)
    for start in range(0, len(lengths), 1000):
        sizes = lengths[start : start + 1000]
        ids = pa.array(rng.integers(1, 30_000, int(sizes.sum()), dtype=np.int32))
        offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))
        ones = np.ones(len(sizes), dtype=np.int32)
        columns = [
            pa.ListArray.from_arrays(offsets, ids),
            pa.array(sizes.astype(np.int32)),
            pa.array(ones),
            pa.array(np.arange(start, start + len(sizes))),
            pa.array(ones),
        ]
        writer.add_batch(pa.record_batch(columns, schema=schema))
    manifest = Manifest(
        task=folder.name,
        split="train",
        schema=schema,
        shards=writer.close(),
        length_histogram=writer.length_histogram(),
        tokenizer={},
        preprocessing={"version": 0, "arguments": {}},
        source={},
        selection={},
        input_fingerprint="",
    )
    write_manifest(folder, manifest=manifest)
    return ShardedDataset(folder, verify="hash")


def step_loader(data: ShardedDataset, *, layout: LengthPlan | None = None) -> StepLoader:
    """Returns this project's loader."""
    return StepLoader(
        {"t": data},
        specs={"t": SPEC},
        plan=BatchPlan(STEP, BATCH, seed=0, layout=layout),
        mixture=RoundRobin(1),
    )


def own_batches(data: ShardedDataset, *, layout: LengthPlan | None = None) -> Iterator[Any]:
    """Yields the tensors of our micro-batches, with the prefetch thread."""
    steps = step_loader(data, layout=layout).iterate(0)
    with contextlib.closing(steps):
        for step in steps:
            for micro in step.micro_batches:
                yield {**micro.inputs, **micro.targets}


def copied_batches(data: ShardedDataset) -> Iterator[Any]:
    """Yields copies of ready batches: no loader can be quicker."""
    ready = list(itertools.islice(own_batches(data), 64))
    for batch in itertools.cycle(ready):
        yield {name: tensor.clone() for name, tensor in batch.items()}


def hf_dataset(data: ShardedDataset) -> Any:
    """Returns the shards as a `datasets.Dataset`, memory-mapped."""
    import datasets

    paths = [data.folder / info.file for info in data.manifest.shards]
    tables = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in paths]
    return datasets.Dataset(pa.concat_tables(tables)).select_columns(["input_ids", "labels"])


def pad_torch(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Returns a padded batch of rows of tensors."""
    ids = [row["input_ids"] for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": torch.stack([row["labels"] for row in rows]),
    }


def hf_trainer_batches(data: ShardedDataset) -> Iterator[Any]:
    """Yields batches as transformers' Trainer makes them: rows and DataCollatorWithPadding."""
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

    vocab = {"[PAD]": 0, "[UNK]": 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="[UNK]")),
        pad_token="[PAD]",
        unk_token="[UNK]",
    )
    loader = torch.utils.data.DataLoader(
        hf_dataset(data),
        batch_size=BATCH,
        shuffle=True,
        collate_fn=DataCollatorWithPadding(tokenizer),
    )
    return iter(loader)


def hf_torch_batches(data: ShardedDataset) -> Iterator[Any]:
    """Yields batches of `with_format("torch")` and a DataLoader."""
    dataset = hf_dataset(data).with_format("torch")
    return iter(
        torch.utils.data.DataLoader(dataset, batch_size=BATCH, shuffle=True, collate_fn=pad_torch)
    )


def stateful_batches(data: ShardedDataset) -> Iterator[Any]:
    """Yields batches of torchdata's StatefulDataLoader over the same."""
    from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-not-found]

    dataset = hf_dataset(data).with_format("torch")
    return iter(StatefulDataLoader(dataset, batch_size=BATCH, shuffle=True, collate_fn=pad_torch))


def mosaic_batches(data: ShardedDataset) -> Iterator[Any]:
    """Yields batches of mosaicml-streaming, from local shards of its own format."""
    from streaming import MDSWriter, StreamingDataset  # type: ignore[import-not-found]

    folder = data.folder.with_name("mds")
    if not folder.exists():
        columns = {"input_ids": "ndarray:int32", "labels": "int"}
        with MDSWriter(out=str(folder), columns=columns) as writer:
            for start in range(0, len(data), 1000):
                rows = data.take(np.arange(start, min(start + 1000, len(data))))
                for ids, label in zip(rows["input_ids"], rows["labels"], strict=True):
                    writer.write({"input_ids": np.array(ids), "labels": int(label)})
    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)

    def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tensors = [
            {
                "input_ids": torch.from_numpy(row["input_ids"].astype(np.int64)),
                "labels": torch.tensor(row["labels"]),
            }
            for row in rows
        ]
        return pad_torch(tensors)

    return iter(torch.utils.data.DataLoader(dataset, batch_size=BATCH, collate_fn=collate))


LOADERS: dict[str, Callable[[ShardedDataset], Iterator[Any]]] = {
    "copy of ready batches (limit)": copied_batches,
    "dist_ft": own_batches,
    "dist_ft, planned by length": partial(own_batches, layout=LengthPlan()),
    "datasets torch format + DataLoader": hf_torch_batches,
    "datasets + DataCollatorWithPadding": hf_trainer_batches,
    "StatefulDataLoader over datasets": stateful_batches,
    "mosaicml-streaming": mosaic_batches,
}


def measure(data: ShardedDataset, *, rounds: int, batches: int) -> Iterator[Measured | str]:
    """Yields what each loader costs, or why it is left out."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in LOADERS}
    missing: dict[str, str] = {}
    # In turns, so that another user of the machine hinders all of them alike.
    for _ in range(rounds):
        for name, make in LOADERS.items():
            if name not in missing:
                try:
                    spent[name].append(_costs(make(data), batches=batches))
                except ImportError as error:
                    missing[name] = f"{name}: left out, as it is not installed ({error})"
    for name, costs in spent.items():
        if name in missing:
            yield missing[name]
            continue
        cpu = [1e6 * seconds for seconds, _ in costs]
        fastest = min(wall for _, wall in costs)
        yield Measured(name, statistics.median(cpu), min(cpu), round(1 / fastest))


def _costs(loader: Iterator[Any], *, batches: int) -> tuple[float, float]:
    """Returns CPU and wall seconds per sample after one batch to warm up."""
    next(loader)
    cpu, started = _cpu_seconds(), time.perf_counter()
    samples = 0
    for number, batch in enumerate(loader, start=1):
        # A planned batch may have other than 32 rows.
        samples += len(batch["labels"])
        if number >= batches and time.perf_counter() - started > LEAST_SECONDS:
            break
    wall = time.perf_counter() - started
    close = getattr(loader, "close", None)
    if close is not None:
        close()
    # After closing, so that worker processes are counted.
    return (_cpu_seconds() - cpu) / samples, wall / samples


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def useful_shares(lengths: np.ndarray, *, world_size: int = 8, each: int = 4) -> dict[str, float]:
    """Returns the share of useful tokens, counting all ranks until the slowest is done."""
    count = world_size * each
    random_shares, planned_shares = [], []
    for start in range(0, min(len(lengths), 200 * STEP) - STEP + 1, STEP):
        own = lengths[start : start + STEP]
        rectangle = own.reshape(world_size, each, -1)
        slowest = (rectangle.max(axis=2) * rectangle.shape[2]).sum(axis=1).max()
        random_shares.append(own.sum() / (world_size * slowest))
        planned = plan_step(own, micro_batches=count, plan=LengthPlan())
        padded = [len(members) * int(own[members].max()) for members in planned.micro_batches]
        ranks = deal(planned.costs, world_size=world_size)
        slowest = max(sum(padded[n] for n in rank if n is not None) for rank in ranks)
        planned_shares.append(own.sum() / (world_size * slowest))
    bins = first_fit(lengths, capacity=512)
    return {
        "in order": float(np.mean(random_shares)),
        "planned": float(np.mean(planned_shares)),
        "packed (rows of 512, first fit)": filled_share(lengths, bins=bins, capacity=512),
    }


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
    costs: Iterable[Measured], shares: dict[str, float], times: dict[str, float]
) -> list[Claim]:
    """Returns what the results are to show."""
    # The least of several rounds is what others on the machine disturbed least.
    cpu = {cost.loader: cost.cpu_us_least for cost in costs}
    own = cpu["dist_ft"]
    peers = {"datasets + DataCollatorWithPadding": 20, "mosaicml-streaming": 10}
    claims = [
        claim(f"CPU of {name} over ours", value=cpu[name] / own, bound=bound, direction="at least")
        for name, bound in peers.items()
        if name in cpu
    ]
    at_8 = "useful tokens at 8 ranks with 4 micro-batches"
    packed = shares["packed (rows of 512, first fit)"]
    resumed = times["dist_ft (slowest of 3)"]
    return [
        *claims,
        claim(f"{at_8}, planned", value=shares["planned"], bound=0.9, direction="at least"),
        claim(f"{at_8}, in order", value=shares["in order"], bound=0.3, direction="at most"),
        claim("useful tokens, packed", value=packed, bound=0.99, direction="at least"),
        claim("seconds to resume", value=resumed, bound=0.05, direction="at most"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    options = parse_arguments(__doc__ or "", arguments)
    torch.set_num_threads(1)
    lengths = text_lengths(20_000 if options.quick else 200_000)
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder) / "shards", lengths=lengths)
        rounds, batches = (3, 150) if options.quick else (6, 400)
        results = list(measure(data, rounds=rounds, batches=batches))
        times = resume_times(data)
    costs = [result for result in results if isinstance(result, Measured)]
    own = next(cost.cpu_us_least for cost in costs if cost.loader == "dist_ft")
    rows = [{**vars(cost), "times_ours": cost.cpu_us_least / own} for cost in costs]
    say(markdown_table(rows, columns=COLUMNS))
    for reason in results:
        if isinstance(reason, str):
            say(reason)
    shares = useful_shares(lengths)
    for name, share in shares.items():
        say(f"useful tokens, {name}: {share:.1%}")
    for name, seconds in times.items():
        say(f"to the first batch at 90 % of an epoch, {name}: {1000 * seconds:.1f} ms")
    return report(
        [*rows, {"useful_share": shares}, {"resume_s": times}],
        claims=claims_of(costs, shares, times),
        packages=PACKAGES,
        options=options,
    )


if __name__ == "__main__":
    sys.exit(main())
