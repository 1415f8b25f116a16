"""Text classification: one label, several labels, or a number, for a text or a pair of texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

import dist_ft.tasks.metrics as metrics
from dist_ft.data.collate import CollateSpec
from dist_ft.tasks.base import (
    Choice,
    LossSum,
    NoGeneration,
    Record,
    RecordMetrics,
    Row,
    check_max_length,
    choose_metric,
    input_padding,
    model_inputs,
    text_of,
    token_types,
)
from dist_ft.tasks.labels import (
    check_labels,
    known_labels,
    label_config,
    label_index,
    label_name,
)
from dist_ft.tasks.single_label import SINGLE_LABEL_METRICS, LabelScan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dist_ft.data.loader import MicroBatch

_METRICS: dict[str, dict[str, bool]] = {
    "single_label": SINGLE_LABEL_METRICS,
    "multi_label": {"micro_f1": True, "macro_f1": True, "exact_match": True},
    "regression": {"mse": False, "mae": False, "pearson": True, "spearman": True},
}


@dataclass(frozen=True)
class TextClassification(LabelScan, NoGeneration):
    """The task type ``text_classification``.

    Attributes:
        name: name in the recipe.
        problem: ``single_label``, ``multi_label`` (label column: lists) or ``regression``.
        text: column of the text.
        text_pair: column of the second text, if there is one.
        label: column of the label.
        labels: label names in the order of their indices; found by ``scan`` if not given.
        max_length: longest feature in tokens; longer texts are cut, of a pair the longer one.
        metric: primary metric.
    """

    name: str
    problem: Literal["single_label", "multi_label", "regression"] = "single_label"
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    labels: Sequence[str] | None = None
    max_length: int = 128
    metric: str | None = None

    type = "text_classification"
    auto_class = "AutoModelForSequenceClassification"

    def __post_init__(self) -> None:
        if self.problem not in _METRICS:
            raise ValueError(
                f"tasks.{self.name}.problem: {self.problem!r} is not one of {', '.join(_METRICS)}"
            )
        if self.problem == "regression" and self.labels is not None:
            raise ValueError(f"tasks.{self.name}.labels: a regression has none; remove the list")
        check_labels(self.labels, task=self.name)
        _ = self.primary_metric

    @property
    def required_columns(self) -> tuple[str, ...]:
        """Columns of the raw rows that must have a value."""
        pair = (self.text_pair,) if self.text_pair else ()
        return (self.text, *pair, self.label)

    @property
    def primary_metric(self) -> tuple[str, bool]:
        """Name of the metric that decides, and whether more is better."""
        return choose_metric(self.metric, task=self.name, known=_METRICS[self.problem])

    @property
    def needs_scan(self) -> bool:
        """Whether the labels must be found in the training rows."""
        return super().needs_scan and self.problem != "regression"

    def config_updates(self) -> dict[str, Any]:
        """Returns the configuration values of the head."""
        if self.problem == "regression":
            return {
                "num_labels": 1,
                "id2label": {0: self.label},
                "label2id": {self.label: 0},
                "problem_type": "regression",
            }
        labels = known_labels(self.labels, task=self.name)
        return {**label_config(labels), "problem_type": f"{self.problem}_classification"}

    def schema(self) -> pa.Schema:
        """Returns the task's columns, without the base columns."""
        label_type = {
            "single_label": pa.int32(),
            "multi_label": pa.list_(pa.int8()),
            "regression": pa.float32(),
        }[self.problem]
        return pa.schema(
            [
                pa.field("token_type_ids", pa.list_(pa.int8())),
                pa.field("labels", label_type),
            ]
        )

    def split_key(self, row: Row) -> str:
        """Returns the texts, which also identify duplicates."""
        return "\x1f".join(text_of(row, c).strip() for c in self.required_columns[:-1])

    def dedupe_key(self, row: Row) -> str:
        """Returns the texts."""
        return self.split_key(row)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Checks that the settings and the tokenizer fit.

        Raises:
            ValueError: the model has fewer positions.
        """
        check_max_length(self.max_length, task=self.name, tokenizer=tokenizer)

    def encode(self, rows: list[Row], *, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
        """Returns one feature per raw row.

        Raises:
            ValueError: a text is none, or a label is not known.
        """
        self.check_tokenizer(tokenizer)
        texts = [text_of(row, self.text) for row in rows]
        pairs = [text_of(row, self.text_pair) for row in rows] if self.text_pair else None
        encoding = tokenizer(texts, pairs, truncation=False, verbose=False)
        full = [len(ids) for ids in encoding["input_ids"]]
        if max(full) > self.max_length:
            encoding = tokenizer(texts, pairs, truncation=True, max_length=self.max_length)
        return [
            {
                "input_ids": encoding["input_ids"][index],
                "token_type_ids": token_types(encoding, index),
                "labels": self._target(row),
                "loss_count": 1,
                "source_row": row["source_row"],
                "truncated_tokens": full[index] - len(encoding["input_ids"][index]),
            }
            for index, row in enumerate(rows)
        ]

    def collate_spec(self, tokenizer: PreTrainedTokenizerBase, *, evaluation: bool) -> CollateSpec:
        """Returns the columns of a micro-batch and their padding."""
        del evaluation
        ragged = input_padding(tokenizer)
        if self.problem == "multi_label":
            ragged["labels"] = 0
        return CollateSpec(
            ragged=ragged,
            scalar=() if self.problem == "multi_label" else ("labels",),
            inputs=model_inputs(tokenizer),
            targets=("labels",),
        )

    def loss(self, outputs: Any, targets: Mapping[str, Tensor]) -> LossSum:
        """Returns the summed loss, computed in float32.

        Cross-entropy; for several labels the binary cross-entropy, mean over labels; for
        regression the squared error.

        Args:
            outputs: ``logits`` [rows, labels].
            targets: ``labels``: int64 [rows], or [rows, labels] of 0 and 1, or float32 [rows].
        """
        logits, labels = outputs["logits"].float(), targets["labels"]
        if self.problem == "single_label":
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        elif self.problem == "multi_label":
            losses = torch.nn.functional.binary_cross_entropy_with_logits(
                logits, labels.float(), reduction="none"
            ).mean(1)
        else:
            losses = (logits[:, 0] - labels.float()).square()
        return LossSum(losses.sum(), torch.tensor(len(labels), device=labels.device))

    def choices(self, outputs: Any, targets: Mapping[str, Tensor]) -> list[Choice]:
        """Returns the choices that the loss scores; none but for a single label."""
        if self.problem != "single_label":
            return []
        return [Choice(outputs["logits"], targets["labels"])]

    def new_metrics(self) -> RecordMetrics:
        """Returns empty metrics."""
        return RecordMetrics(decode=self._decode, score=self._score)

    def _names(self, row: Row) -> list[str]:
        value = row.get(self.label)
        if self.problem == "single_label":
            return [label_name(value)]
        if not isinstance(value, list | tuple | np.ndarray):
            raise ValueError(
                f"tasks.{self.name}.label: problem multi_label needs lists in column "
                f"{self.label!r}, got {value!r}"
            )
        return [label_name(item) for item in value]

    def check_row(self, row: Row) -> None:
        """Checks what encoding asks of the label.

        Raises:
            ValueError: it is not known, or no number.
        """
        self._target(row)

    def _target(self, row: Row) -> int | float | list[int]:
        if self.problem == "regression":
            return self._number(row)
        labels = known_labels(self.labels, task=self.name)
        chosen = [label_index(name, labels=labels, task=self.name) for name in self._names(row)]
        if self.problem == "single_label":
            return chosen[0]
        return [int(index in chosen) for index in range(len(labels))]

    def _number(self, row: Row) -> float:
        value = row.get(self.label)
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"tasks.{self.name}.label: regression needs finite numbers in column "
                f"{self.label!r}, got {value!r}"
            )
        return number

    def _decode(self, outputs: Any, batch: MicroBatch, texts: Sequence[str] | None) -> list[Record]:
        del texts
        logits = outputs["logits"].float()
        if self.problem == "single_label":
            predictions = logits.argmax(1)
        elif self.problem == "multi_label":
            predictions = (logits > 0).long()
        else:
            predictions = logits[:, 0]
        pairs = zip(predictions.tolist(), batch.targets["labels"].tolist(), strict=True)
        return [{"prediction": left, "label": right} for left, right in pairs]

    def _score(self, records: Sequence[Record]) -> dict[str, float]:
        predictions = [record["prediction"] for record in records]
        labels = [record["label"] for record in records]
        if self.problem == "regression":
            return _regression_scores(np.array(predictions, float), np.array(labels, float))
        if self.problem == "single_label":
            return metrics.single_label_scores(records)
        predicted, expected = np.array(predictions, np.int64), np.array(labels, np.int64)
        return metrics.multi_label_f1(predicted, expected)


def _regression_scores(predictions: metrics.Floats, labels: metrics.Floats) -> dict[str, float]:
    errors = predictions - labels
    return {
        "mse": float(np.square(errors).mean()),
        "mae": float(np.abs(errors).mean()),
        "pearson": metrics.pearson(predictions, labels),
        "spearman": metrics.spearman(predictions, labels),
        "baseline_mean_mse": float(labels.var()),
    }
