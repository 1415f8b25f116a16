"""What every task type provides, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

import pyarrow as pa
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dist_ft.data.collate import CollateSpec
    from dist_ft.data.loader import MicroBatch

Row = dict[str, Any]
Record = dict[str, Any]

IGNORE_INDEX = -100


@dataclass(frozen=True)
class LossSum:
    """A loss before normalisation.

    Attributes:
        sum: sum of the loss terms, float32 scalar.
        count: number of loss terms, int64 scalar.
    """

    sum: Tensor
    count: Tensor


@dataclass(frozen=True)
class Choice:
    """Choices among classes and what is right.

    Attributes:
        logits: [choices, classes].
        labels: right classes, int64 [choices].
    """

    logits: Tensor
    labels: Tensor


class Metrics(Protocol):
    """Collects what a task's metrics need, one JSON-able record per data set row.

    Records of all ranks are gathered, duplicates of a row dropped, sorted by row and given to
    ``compute``: metrics on many ranks equal those on one.
    """

    def update(
        self, outputs: Any, batch: MicroBatch, *, texts: Sequence[str] | None = None
    ) -> None:
        """Adds the records of a micro-batch; a filler (loss_weight 0) adds none.

        Args:
            outputs: outputs of the model.
            batch: the micro-batch.
            texts: what ``Task.generate`` returned for it, if the task generates.
        """
        ...

    def records(self) -> list[Record]:
        """Returns the records so far, each with the data set row under ``row``."""
        ...

    def compute(self, records: Sequence[Record]) -> dict[str, float]:
        """Returns the metrics of the records."""
        ...


class Task(Protocol):
    """One task: from raw rows to features, loss and metrics."""

    @property
    def name(self) -> str:
        """Name in the recipe."""
        ...

    @property
    def type(self) -> str:
        """Task type in the recipe."""
        ...

    @property
    def auto_class(self) -> str:
        """The transformers auto class whose head and export format the task uses."""
        ...

    @property
    def required_columns(self) -> tuple[str, ...]:
        """Columns of the raw rows that must have a value."""
        ...

    @property
    def primary_metric(self) -> tuple[str, bool]:
        """Name of the metric that decides, and whether more is better."""
        ...

    @property
    def needs_scan(self) -> bool:
        """Whether ``scan`` must see the training rows before the task can be used."""
        ...

    @property
    def generates(self) -> bool:
        """Whether evaluation calls ``generate``."""
        ...

    def scan(self, rows: Iterable[Row]) -> dict[str, Any]:
        """Returns what must be known of the training rows (the labels), JSON-able."""
        ...

    def with_state(self, state: Mapping[str, Any]) -> Self:
        """Returns the task with what ``scan`` returned."""
        ...

    def config_updates(self) -> dict[str, Any]:
        """Returns the configuration values of the head."""
        ...

    def schema(self) -> pa.Schema:
        """Returns the task's columns, without the base columns."""
        ...

    def split_key(self, row: Row) -> str:
        """Returns the key whose rows stay together when data is split."""
        ...

    def dedupe_key(self, row: Row) -> str:
        """Returns the key of which only the first row is kept."""
        ...

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Checks that the task's settings and the tokenizer fit, before any row is encoded.

        Raises:
            ValueError: they do not.
        """
        ...

    def encode(self, rows: list[Row], *, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
        """Returns the features of raw rows; a row gives none, one or several.

        Raises:
            ValueError: a row cannot be encoded.
        """
        ...

    def collate_spec(self, tokenizer: PreTrainedTokenizerBase, *, evaluation: bool) -> CollateSpec:
        """Returns the columns of a micro-batch and their padding."""
        ...

    def loss(self, outputs: Any, targets: Mapping[str, Tensor]) -> LossSum:
        """Returns the summed loss, computed in float32."""
        ...

    def choices(self, outputs: Any, targets: Mapping[str, Tensor]) -> list[Choice]:
        """Returns the choices that the loss scores; sets of them have their mean in the loss."""
        ...

    def new_metrics(self) -> Metrics:
        """Returns empty metrics."""
        ...

    def generate(
        self, model: Any, *, batch: MicroBatch, tokenizer: PreTrainedTokenizerBase, synced: bool
    ) -> list[str]:
        """Returns one generated text per row.

        Args:
            model: the ``MultiTaskModel``.
            batch: the micro-batch.
            tokenizer: the model's tokenizer.
            synced: whether ranks must run the same number of forwards (partitioned weights).
        """
        ...


@dataclass
class RecordMetrics:
    """Metrics made of two functions of the task.

    Attributes:
        decode: outputs, micro-batch and generated texts -> one record per row, without ``row``.
        score: records -> metrics.
    """

    decode: Callable[[Any, MicroBatch, Sequence[str] | None], list[Record]]
    score: Callable[[Sequence[Record]], dict[str, float]]
    _records: list[Record] = field(default_factory=list)

    def update(
        self, outputs: Any, batch: MicroBatch, *, texts: Sequence[str] | None = None
    ) -> None:
        """Adds the records of a micro-batch; a filler (loss_weight 0) adds none."""
        if batch.loss_weight == 0:
            return
        decoded = self.decode(outputs, batch, texts)
        for row, record in zip(batch.rows.tolist(), decoded, strict=True):
            self._records.append({"row": row, **record})

    def records(self) -> list[Record]:
        """Returns the records so far, each with the data set row under ``row``."""
        return list(self._records)

    def compute(self, records: Sequence[Record]) -> dict[str, float]:
        """Returns the metrics of the records.

        Raises:
            ValueError: there are none.
        """
        if not records:
            raise ValueError("metrics need at least one row, the evaluated split has none")
        return self.score(records)


class NoGeneration:
    """Mix-in for tasks whose evaluation needs no generated text."""

    generates = False

    def generate(
        self, model: Any, *, batch: MicroBatch, tokenizer: PreTrainedTokenizerBase, synced: bool
    ) -> list[str]:
        """Returns nothing; such a task is never asked to generate."""
        del model, batch, tokenizer, synced
        return []


def choose_metric(chosen: str | None, *, task: str, known: Mapping[str, bool]) -> tuple[str, bool]:
    """Returns the primary metric and whether more of it is better.

    Args:
        chosen: the recipe's metric, ``None`` for the first known one.
        task: task name, for the error.
        known: metric name -> whether more is better.

    Raises:
        ValueError: the task has no such metric.
    """
    name = chosen or next(iter(known))
    if name not in known:
        raise ValueError(f"tasks.{task}.metric: {name!r} is not one of {', '.join(known)}")
    return name, known[name]


def text_of(row: Row, column: str) -> str:
    """Returns a text column's value.

    Raises:
        ValueError: it is absent, or no text.
    """
    value = row.get(column)
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} must hold text, got {value!r}")
    return value


def check_fast(tokenizer: PreTrainedTokenizerBase, *, task: str) -> None:
    """Checks that the tokenizer tells where its tokens come from.

    Raises:
        ValueError: it does not.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"tasks.{task}: this task needs a fast tokenizer (tokenizer.json), "
            f"{type(tokenizer).__name__} is none; use another model, or convert the tokenizer"
        )


def check_max_length(
    max_length: int, *, task: str, tokenizer: PreTrainedTokenizerBase, least: int = 8
) -> None:
    """Checks that features of ``max_length`` tokens are possible.

    Raises:
        ValueError: the tokenizer's model has fewer positions, or too little is left for text.
    """
    limit = tokenizer.model_max_length
    if max_length > limit:
        raise ValueError(
            f"tasks.{task}.max_length: {max_length} is more than the model's {limit} positions; "
            f"use at most {limit}"
        )
    if max_length < least:
        raise ValueError(f"tasks.{task}.max_length: {max_length} must be at least {least}")


def token_types(encoding: Mapping[str, Any], index: int) -> list[int]:
    """Returns the token types (sentence A or B) of a feature, zeros where there are none."""
    if "token_type_ids" in encoding:
        return encoding["token_type_ids"][index]
    return [0] * len(encoding["input_ids"][index])


def model_inputs(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Returns the model's keyword arguments among the columns of an encoder-style feature."""
    known = ("input_ids", "attention_mask", "token_type_ids")
    return tuple(name for name in known if name in tokenizer.model_input_names)


def input_padding(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | float]:
    """Returns the padding values of the input columns."""
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    return {"input_ids": pad, "token_type_ids": tokenizer.pad_token_type_id}


def labelled(logits: Tensor, targets: Tensor) -> Choice:
    """Returns the labelled positions, see ``token_losses``."""
    chosen = targets != IGNORE_INDEX
    return Choice(logits[chosen], targets[chosen])


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy of the labelled positions, float32 [labelled positions].

    Only labelled positions are converted to float32: a language model's logits are large.

    Args:
        logits: [..., classes].
        targets: class indices, int64 [...], ``IGNORE_INDEX`` for no label.
    """
    chosen = targets != IGNORE_INDEX
    return torch.nn.functional.cross_entropy(
        logits[chosen].float(), targets[chosen], reduction="none"
    )
