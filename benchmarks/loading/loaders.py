"""This project's loader and the others, each an iterator of padded batches."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.loading.data import BATCH, SPEC, step_loader
from dist_ft.data.collate import collate
from dist_ft.data.loader import LengthPlan
from dist_ft.data.shards import ShardedDataset

OURS = "dist_ft"


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
    """Yields batches of mosaicml-streaming, from local shards of its own format.

    At its quickest: tokens as bytes and our padding (its arrays and torch's `pad_sequence` cost a
    third more), and no workers (one costs four times as much).
    """
    from streaming import MDSWriter, StreamingDataset  # type: ignore[import-not-found]

    folder = data.folder.with_name("mds")
    if not folder.exists():
        with MDSWriter(out=str(folder), columns={"input_ids": "bytes", "labels": "int"}) as writer:
            for start in range(0, len(data), 1000):
                rows = data.take(np.arange(start, min(start + 1000, len(data))))
                for ids, label in zip(rows["input_ids"], rows["labels"], strict=True):
                    writer.write({"input_ids": np.asarray(ids).tobytes(), "labels": int(label)})
    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)

    def pad(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [np.frombuffer(row["input_ids"], dtype=np.int32) for row in rows]
        labels = np.array([row["labels"] for row in rows])
        inputs, targets = collate({"input_ids": ids, "labels": labels}, SPEC)
        return {**inputs, **targets}

    return iter(torch.utils.data.DataLoader(dataset, batch_size=BATCH, collate_fn=pad))


LOADERS: dict[str, Callable[[ShardedDataset], Iterator[Any]]] = {
    "copy of ready batches (limit)": copied_batches,
    OURS: own_batches,
    f"{OURS}, planned by length": partial(own_batches, layout=LengthPlan()),
    "datasets torch format + DataLoader": hf_torch_batches,
    "datasets + DataCollatorWithPadding": hf_trainer_batches,
    "StatefulDataLoader over datasets": stateful_batches,
    "mosaicml-streaming": mosaic_batches,
}
