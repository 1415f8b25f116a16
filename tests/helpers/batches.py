"""From a task's raw rows to micro-batches, through real prepared shards."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dist_ft.data.loader import MicroBatch, eval_batches
from dist_ft.data.prepare import PrepareSpec, RowFunctions, SplitPlan, prepare_split
from dist_ft.data.shards import ShardedDataset
from dist_ft.data.sources import SourceSpec
from dist_ft.tasks.base import Record, Task

Forward = Callable[[MicroBatch], Any]


def numbered(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Raw rows as ``encode`` gets them."""
    return [{**row, "source_row": index} for index, row in enumerate(rows)]


def prepared(
    task: Task,
    rows: Sequence[dict[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> ShardedDataset:
    """The rows prepared as training data."""
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    functions = RowFunctions(
        schema=task.schema(),
        required_columns=task.required_columns,
        split_key=task.split_key,
        dedupe_key=task.dedupe_key,
        encode=lambda batch: task.encode(batch, tokenizer=tokenizer),
    )
    plan = SplitPlan(sources={"train": SourceSpec(path=str(source))}, base_dir=folder)
    spec = PrepareSpec(task=task.name, plan=plan, functions=functions)
    done = prepare_split(spec, split="train", data_dir=folder / "data")
    return ShardedDataset(done.folder, verify="hash")


def batches(
    task: Task,
    dataset: ShardedDataset,
    *,
    tokenizer: PreTrainedTokenizerBase,
    size: int = 2,
    rank: int = 0,
    world_size: int = 1,
) -> list[MicroBatch]:
    """The micro-batches of an evaluation."""
    spec = task.collate_spec(tokenizer, evaluation=True)
    return list(
        eval_batches(dataset, spec=spec, micro_batch_size=size, rank=rank, world_size=world_size)
    )


def records(
    task: Task,
    dataset: ShardedDataset,
    *,
    forward: Forward,
    tokenizer: PreTrainedTokenizerBase,
    world_size: int = 1,
) -> list[Record]:
    """The records of all ranks as the evaluator joins them, through JSON."""
    found: dict[int, Record] = {}
    for rank in range(world_size):
        metrics = task.new_metrics()
        for batch in batches(task, dataset, tokenizer=tokenizer, rank=rank, world_size=world_size):
            metrics.update(forward(batch), batch)
        for record in json.loads(json.dumps(metrics.records())):
            found[record["row"]] = record
    return [found[row] for row in sorted(found)]
