"""Small prepared data sets for tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dist_ft.data.collate import CollateSpec
from dist_ft.data.schema import shard_schema
from dist_ft.data.shards import Manifest, ShardedDataset, ShardWriter, write_manifest

TASK_SCHEMA = pa.schema(
    [
        pa.field("labels", pa.list_(pa.int32())),
        pa.field("score", pa.float32()),
        pa.field("name", pa.string()),
    ]
)
SPEC = CollateSpec(
    ragged={"input_ids": 0, "labels": -100},
    scalar=("score", "source_row"),
    inputs=("input_ids", "attention_mask"),
    targets=("labels", "score", "source_row"),
    kept=("name",),
)


def feature(row: int, *, length: int) -> dict[str, Any]:
    return {
        "input_ids": [1 + (row + i) % 97 for i in range(length)],
        "length": length,
        "loss_count": max(0, length - 1),
        "source_row": row,
        "labels": [-100, *range(1, length)],
        "score": row / 2,
        "name": f"zeile-{row}-ü",
    }


def write_folder(folder: Path, *, lengths: Sequence[int], target_bytes: int = 2000) -> Manifest:
    folder.mkdir(parents=True)
    schema = shard_schema(TASK_SCHEMA)
    writer = ShardWriter(folder, schema=schema, target_bytes=target_bytes)
    features = [feature(row, length=length) for row, length in enumerate(lengths)]
    for start in range(0, len(features), 7):
        writer.add(features[start : start + 7])
    return finish_folder(folder, writer=writer, schema=schema)


def finish_folder(folder: Path, *, writer: ShardWriter, schema: pa.Schema) -> Manifest:
    """Close the writer of an invented data set and write its manifest."""
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
    return manifest


def make_dataset(
    folder: Path, *, lengths: Sequence[int], target_bytes: int = 2000
) -> ShardedDataset:
    write_folder(folder, lengths=lengths, target_bytes=target_bytes)
    return ShardedDataset(folder, verify="hash")
