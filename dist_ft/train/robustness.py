"""How much a task's score suffers when the words of its rows are changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from dist_ft.config import (
    CasingConfig,
    CharacterNoiseConfig,
    KeyboardTyposConfig,
    PunctuationInsertionConfig,
    TaskConfig,
    TransformConfig,
    WordDropoutConfig,
)
from dist_ft.data.augment.augmenter import Augmenter
from dist_ft.data.augmented import columns_of
from dist_ft.data.collate import collate, kept_columns
from dist_ft.data.files import Row
from dist_ft.data.loader import MicroBatch
from dist_ft.data.schema import shard_schema
from dist_ft.tasks.base import Metrics, Record
from dist_ft.train.augmentation import make_augmenter
from dist_ft.train.data import PreparedTask, selected_rows
from dist_ft.train.evaluate import EvalData, paired_bootstrap
from dist_ft.train.run_shards import has_source

ROWS = 1000
SHARE = 0.1  # of the words, for transforms that the recipe does not set itself
RESAMPLES = 100

Forward = Callable[[str, MicroBatch], tuple[Tensor, Any]]


def measure_robustness(
    config: TaskConfig, *, prepared: PreparedTask, data: EvalData, tokenizer: Any, forward: Forward
) -> dict[str, Any]:
    """Return the deciding metric as it is and under each transform, with bootstrap intervals.

    The raw rows are changed as augmentation changes them, labels along with them, encoded again
    and scored. At most `ROWS` rows of the split are used, the first ones.

    Args:
        config: The task in the recipe; its own transforms are used as they are set there.
        prepared: The task with its data.
        data: The split.
        tokenizer: Of the model.
        forward: Runs a micro-batch.
    """
    if config.takes != "text" or (config.type == "generation" and config.messages is not None):
        return {"skipped": "transforms change texts, and these rows are none"}
    try:
        read = selected_rows(config, prepared.task, tokenizer=tokenizer, split=data.split)
        rows = list(islice(read, ROWS))
        same = has_source(config, data.dataset)
    except (ValueError, RuntimeError, OSError) as error:
        return {"skipped": f"the raw rows cannot be read any more: {error}"}
    if not same:
        return {"skipped": "the raw rows have changed since the run was trained"}
    metric, _ = prepared.task.primary_metric
    scorer = _Scorer(data, tokenizer=tokenizer, forward=forward)
    metrics, plain = scorer.records(rows)
    under: list[dict[str, Any]] = []
    for transform in _transforms(config):
        augmenter = make_augmenter(
            [transform], config=config, task=prepared.task, dataset=prepared.datasets["train"]
        )
        changed, count = _changed(rows, augmenter)
        _, records = scorer.records(changed)
        difference, low, high = paired_bootstrap(metrics, records, plain, resamples=RESAMPLES)[
            metric
        ]
        under.append(
            {
                "transform": transform.type,
                "share": getattr(transform, "share", None),
                "changed_rows": count,
                "difference": difference,
                "interval": [low, high],
            }
        )
    clean = metrics.compute(plain)[metric]
    return {"rows": len(rows), "metric": metric, "clean": clean, "under": under}


def _transforms(config: TaskConfig) -> list[TransformConfig]:
    standard = (
        KeyboardTyposConfig(type="keyboard_typos", share=SHARE),
        CharacterNoiseConfig(type="character_noise", share=SHARE),
        CasingConfig(type="casing", share=SHARE),
        PunctuationInsertionConfig(type="punctuation_insertion", share=SHARE),
        WordDropoutConfig(type="word_dropout", share=SHARE),
    )
    own = {t.type: t.model_copy(update={"probability": 1.0}) for t in config.augmentation}
    return list(({t.type: t for t in standard} | own).values())


def _changed(rows: Sequence[Row], augmenter: Augmenter) -> tuple[list[Row], int]:
    changed, count = [], 0
    for row in rows:
        # Of one seed for all runs, so that runs compare.
        after, changes = augmenter.apply(row, seed=0, epoch=0, row=row["source_row"])
        changed.append({**after, "source_row": row["source_row"]})
        count += changes.changed
    return changed, count


class _Scorer:
    """Scores raw rows that are in no shard."""

    def __init__(self, data: EvalData, *, tokenizer: Any, forward: Forward) -> None:
        self._data = data
        self._tokenizer = tokenizer
        self._forward = forward
        self._schema = shard_schema(data.task.schema())

    def records(self, rows: list[Row]) -> tuple[Metrics, list[Record]]:
        """Return metrics to compute, and the rows' records in their order."""
        task, metrics = self._data.task, self._data.task.new_metrics()
        features = task.encode(rows, tokenizer=self._tokenizer)
        # Rows of a length together: padding is most of the work otherwise.
        order = sorted(range(len(features)), key=lambda i: len(features[i]["input_ids"]))
        size = self._data.micro_batch_size
        for index, start in enumerate(range(0, len(order), size)):
            places = order[start : start + size]
            batch = self._batch([features[i] for i in places], places=places, index=index)
            _, outputs = self._forward(task.name, batch)
            texts = None if self._data.generate is None else self._data.generate(batch)
            metrics.update(outputs, batch, texts=texts)
        return metrics, sorted(metrics.records(), key=lambda record: record["row"])

    def _batch(
        self, features: list[Mapping[str, Any]], *, places: list[int], index: int
    ) -> MicroBatch:
        columns = columns_of(features, schema=self._schema)
        inputs, targets = collate(columns, self._data.spec)
        return MicroBatch(
            inputs=inputs,
            targets=targets,
            kept=kept_columns(columns, self._data.spec),
            rows=np.array(places, np.int64),
            index=index,
            tokens=sum(len(f["input_ids"]) for f in features),
            loss_weight=1.0,
        )
