"""Sequences with the lengths of real text, as shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from dist_ft.data.collate import CollateSpec
from dist_ft.data.loader import BatchPlan, LengthPlan, StepLoader
from dist_ft.data.sampling import RoundRobin
from dist_ft.data.schema import shard_schema
from dist_ft.data.shards import ShardedDataset, ShardWriter
from tests.helpers.datasets import finish_folder

BATCH = 32
STEP = 256
SPEC = CollateSpec(
    ragged={"input_ids": 0},
    scalar=("labels",),
    inputs=("input_ids", "attention_mask"),
    targets=("labels",),
)


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
    finish_folder(folder, writer=writer, schema=schema)
    return ShardedDataset(folder, verify="hash")


def step_loader(data: ShardedDataset, *, layout: LengthPlan | None = None) -> StepLoader:
    """Returns this project's loader."""
    return StepLoader(
        {"t": data},
        specs={"t": SPEC},
        plan=BatchPlan(STEP, BATCH, seed=0, layout=layout),
        mixture=RoundRobin(1),
    )
