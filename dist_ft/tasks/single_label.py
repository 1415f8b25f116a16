"""What tasks share whose rows have one label: finding the labels, loss, choices and metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

import dist_ft.tasks.metrics as metrics
from dist_ft.tasks.base import Choice, LossSum, Record, RecordMetrics, Row, choose_metric
from dist_ft.tasks.labels import (
    FoundLabels,
    check_labels,
    discover_labels,
    known_labels,
    label_config,
    label_index,
    label_name,
)

if TYPE_CHECKING:
    from dist_ft.data.loader import MicroBatch

SINGLE_LABEL_METRICS = {"accuracy": True, "macro_f1": True, "mcc": True}


class LabelScan(ABC):
    """Mix-in for tasks whose labels are given or found in the training rows."""

    name: str
    labels: Sequence[str] | None

    @property
    def needs_scan(self) -> bool:
        """Whether the labels must be found in the training rows."""
        return self.labels is None

    def scan(self, rows: Iterable[Row]) -> dict[str, Any]:
        """Returns the labels of the training rows under ``labels``.

        Raises:
            ValueError: the label column holds no labels.
        """
        names = (name for row in rows for name in self._names(row))
        return {"labels": discover_labels(names, task=self.name)}

    def with_state(self, state: Mapping[str, Any]) -> Self:
        """Returns the task with the labels that ``scan`` found."""
        task: Any = self
        return replace(task, labels=FoundLabels(state["labels"])) if self.needs_scan else task

    def has_labels(self, row: Row) -> bool:
        """Returns whether the row's labels can be read; ``scan`` raises at others."""
        try:
            self._names(row)
        except ValueError:
            return False
        return True

    @abstractmethod
    def _names(self, row: Row) -> list[str]:
        """Return the label names of a row."""


class SingleLabel(LabelScan):
    """Mix-in for tasks with one label for a row that is no text."""

    label: str
    metric: str | None

    def __post_init__(self) -> None:
        check_labels(self.labels, task=self.name)
        _ = self.primary_metric

    @property
    @abstractmethod
    def content(self) -> str:
        """Column of what is classified."""

    @property
    def required_columns(self) -> tuple[str, ...]:
        """Columns of the raw rows that must have a value."""
        return (self.content, self.label)

    @property
    def primary_metric(self) -> tuple[str, bool]:
        """Name of the metric that decides, and whether more is better."""
        return choose_metric(self.metric, task=self.name, known=SINGLE_LABEL_METRICS)

    def config_updates(self) -> dict[str, Any]:
        """Returns the configuration values of the head."""
        return label_config(known_labels(self.labels, task=self.name))

    def split_key(self, row: Row) -> str:
        """Returns what is classified: its copies stay on one side."""
        return repr(row.get(self.content))

    def dedupe_key(self, row: Row) -> str:
        """Returns what is classified, and its label."""
        return f"{self.split_key(row)}\x1f{label_name(row.get(self.label))}"

    def loss(self, outputs: Any, targets: Mapping[str, Tensor]) -> LossSum:
        """Returns the summed cross-entropy, computed in float32.

        Args:
            outputs: ``logits`` [rows, labels].
            targets: ``labels``: int64 [rows].
        """
        labels = targets["labels"]
        losses = torch.nn.functional.cross_entropy(
            outputs["logits"].float(), labels, reduction="none"
        )
        return LossSum(losses.sum(), torch.tensor(len(labels), device=labels.device))

    def choices(self, outputs: Any, targets: Mapping[str, Tensor]) -> list[Choice]:
        """Returns the choices that the loss scores."""
        return [Choice(outputs["logits"], targets["labels"])]

    def new_metrics(self) -> RecordMetrics:
        """Returns empty metrics."""
        return RecordMetrics(decode=_decode, score=metrics.single_label_scores)

    def _names(self, row: Row) -> list[str]:
        return [label_name(row.get(self.label))]

    def check_row(self, row: Row) -> None:
        """Checks what encoding asks of the label.

        Raises:
            ValueError: it is not known.
        """
        self._label_index(row)

    def _label_index(self, row: Row) -> int:
        labels = known_labels(self.labels, task=self.name)
        return label_index(row.get(self.label), labels=labels, task=self.name)


def _decode(outputs: Any, batch: MicroBatch, texts: Sequence[str] | None) -> list[Record]:
    del texts
    pairs = zip(
        outputs["logits"].float().argmax(1).tolist(), batch.targets["labels"].tolist(), strict=True
    )
    return [{"prediction": left, "label": right} for left, right in pairs]
