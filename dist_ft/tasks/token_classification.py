"""Token classification: a label for every word; BIO tags are scored as entities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from torch import Tensor

import dist_ft.tasks.metrics as metrics
from dist_ft.data.collate import CollateSpec
from dist_ft.tasks.base import (
    IGNORE_INDEX,
    Choice,
    LossSum,
    NoGeneration,
    Record,
    RecordMetrics,
    Row,
    check_fast,
    check_max_length,
    choose_metric,
    input_padding,
    labelled,
    model_inputs,
    token_losses,
    token_types,
)
from dist_ft.tasks.labels import (
    check_labels,
    known_labels,
    label_config,
    label_index,
    label_name,
)
from dist_ft.tasks.single_label import LabelScan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dist_ft.data.loader import MicroBatch

_ENTITY_METRICS = {"f1": True, "precision": True, "recall": True, "token_accuracy": True}
_PLAIN_METRICS = {"token_accuracy": True, "macro_f1": True}


@dataclass(frozen=True)
class TokenClassification(LabelScan, NoGeneration):
    """The task type ``token_classification``.

    The first subword of a word carries its label, other tokens none. Words cut off, or without a
    subword, have no loss, but count in evaluation as predicted ``O`` (or the first label).

    Attributes:
        name: name in the recipe.
        tokens: column of the words, a list of texts.
        tags: column of the labels, a list as long.
        labels: label names in the order of their indices; found by ``scan`` if not given.
        max_length: longest feature in tokens; longer sentences are cut.
        metric: primary metric.
    """

    name: str
    tokens: str = "tokens"
    tags: str = "tags"
    labels: Sequence[str] | None = None
    max_length: int = 128
    metric: str | None = None

    type = "token_classification"
    auto_class = "AutoModelForTokenClassification"

    def __post_init__(self) -> None:
        check_labels(self.labels, task=self.name)
        _ = self.primary_metric

    @property
    def required_columns(self) -> tuple[str, ...]:
        """Columns of the raw rows that must have a value."""
        return (self.tokens, self.tags)

    @property
    def is_bio(self) -> bool:
        """Whether the labels are BIO tags, and so mark entities."""
        labels = set(self.labels or ()) - {"O"}
        return bool(labels) and all(label.startswith(("B-", "I-")) for label in labels)

    @property
    def primary_metric(self) -> tuple[str, bool]:
        """Name of the metric that decides: entity F1 for BIO tags, token accuracy for others."""
        known = _ENTITY_METRICS if self.is_bio else _PLAIN_METRICS
        if self.labels is None:  # either may come out of the scan
            known = _ENTITY_METRICS | _PLAIN_METRICS
        return choose_metric(self.metric, task=self.name, known=known)

    def scan(self, rows: Iterable[Row]) -> dict[str, Any]:
        """Returns the labels of the training rows under ``labels``, ``O`` first.

        Raises:
            ValueError: the tag column holds no labels.
        """
        labels = super().scan(rows)["labels"]
        return {"labels": sorted(labels, key=lambda label: label != "O")}

    def config_updates(self) -> dict[str, Any]:
        """Returns the configuration values of the head."""
        return label_config(known_labels(self.labels, task=self.name))

    def schema(self) -> pa.Schema:
        """Returns the task's columns, without the base columns.

        ``labels`` and ``word`` (index of the labelled word, -1 for other tokens) are per token,
        ``tags`` (label index) per word of the uncut sentence.
        """
        return pa.schema(
            [
                pa.field("token_type_ids", pa.list_(pa.int8())),
                pa.field("labels", pa.list_(pa.int32())),
                pa.field("word", pa.list_(pa.int32())),
                pa.field("tags", pa.list_(pa.int32())),
            ]
        )

    def split_key(self, row: Row) -> str:
        """Returns the words, which also identify duplicates."""
        return "\x1f".join(self._words(row)[0])

    def dedupe_key(self, row: Row) -> str:
        """Returns the words."""
        return self.split_key(row)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Checks that the settings and the tokenizer fit.

        Raises:
            ValueError: the model has fewer positions, or the tokenizer cannot tell words.
        """
        check_max_length(self.max_length, task=self.name, tokenizer=tokenizer)
        check_fast(tokenizer, task=self.name)

    def check_row(self, row: Row) -> None:
        """Checks what encoding asks of words and tags.

        Raises:
            ValueError: they differ in number, or a tag is not known.
        """
        labels = known_labels(self.labels, task=self.name)
        for tag in self._words(row)[1]:
            label_index(tag, labels=labels, task=self.name)

    def encode(self, rows: list[Row], *, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
        """Returns one feature per raw row.

        Raises:
            ValueError: the tokenizer cannot tell words, words and tags differ in number, or a
                label is not known.
        """
        self.check_tokenizer(tokenizer)
        labels = known_labels(self.labels, task=self.name)
        pairs = [self._words(row) for row in rows]
        spaced = needs_leading_space(tokenizer)
        words = [[f" {w}" if spaced and i else w for i, w in enumerate(p[0])] for p in pairs]
        full = tokenizer(words, is_split_into_words=True, truncation=False, verbose=False)
        lengths = [len(ids) for ids in full["input_ids"]]
        encoding = full
        if max(lengths) > self.max_length:
            encoding = tokenizer(
                words, is_split_into_words=True, truncation=True, max_length=self.max_length
            )
        features = []
        for index, (row, (_, raw)) in enumerate(zip(rows, pairs, strict=True)):
            tags = [label_index(tag, labels=labels, task=self.name) for tag in raw]
            word = first_subwords(encoding.word_ids(index))
            ids = encoding["input_ids"][index]
            features.append(
                {
                    "input_ids": ids,
                    "token_type_ids": token_types(encoding, index),
                    "labels": [tags[w] if w >= 0 else IGNORE_INDEX for w in word],
                    "word": word,
                    "tags": tags,
                    "loss_count": sum(w >= 0 for w in word),
                    "source_row": row["source_row"],
                    "truncated_tokens": lengths[index] - len(ids),
                }
            )
        return features

    def collate_spec(self, tokenizer: PreTrainedTokenizerBase, *, evaluation: bool) -> CollateSpec:
        """Returns the columns of a micro-batch and their padding."""
        return CollateSpec(
            ragged={**input_padding(tokenizer), "labels": IGNORE_INDEX},
            inputs=model_inputs(tokenizer),
            targets=("labels",),
            kept=("word", "tags") if evaluation else (),
        )

    def loss(self, outputs: Any, targets: Mapping[str, Tensor]) -> LossSum:
        """Returns the cross-entropy summed over labelled tokens, computed in float32.

        Args:
            outputs: ``logits`` [rows, tokens, labels].
            targets: ``labels`` int64 [rows, tokens], -100 for none.
        """
        labels = targets["labels"]
        losses = token_losses(outputs["logits"], labels)
        return LossSum(losses.sum(), (labels != IGNORE_INDEX).sum())

    def choices(self, outputs: Any, targets: Mapping[str, Tensor]) -> list[Choice]:
        """Returns the choices that the loss scores."""
        return [labelled(outputs["logits"], targets["labels"])]

    def new_metrics(self) -> RecordMetrics:
        """Returns empty metrics."""
        return RecordMetrics(decode=self._decode, score=self._score)

    def _names(self, row: Row) -> list[str]:
        return [label_name(tag) for tag in self._words(row)[1]]

    def _words(self, row: Row) -> tuple[list[str], list[Any]]:
        words, tags = row.get(self.tokens), row.get(self.tags)
        lists = (list, tuple, np.ndarray)
        if not isinstance(words, lists) or not isinstance(tags, lists):
            raise ValueError(
                f"tasks.{self.name}: columns {self.tokens!r} and {self.tags!r} must hold lists"
            )
        if len(words) != len(tags) or not len(words):
            raise ValueError(
                f"tasks.{self.name}: a row has {len(words)} words and {len(tags)} tags; it needs "
                "one tag per word"
            )
        if not all(isinstance(word, str) for word in words):
            raise ValueError(f"tasks.{self.name}: column {self.tokens!r} must hold lists of text")
        return list(words), list(tags)

    def _decode(self, outputs: Any, batch: MicroBatch, texts: Sequence[str] | None) -> list[Record]:
        del texts
        labels = known_labels(self.labels, task=self.name)
        default = labels.index("O") if "O" in labels else 0
        records: list[Record] = []
        chosen = outputs["logits"].argmax(-1).tolist()
        columns = zip(chosen, batch.kept["word"], batch.kept["tags"], strict=True)
        for tokens, word, tags in columns:
            predicted = [default] * len(tags)
            for token, index in zip(tokens, word.tolist(), strict=False):  # the rest is padding
                if index >= 0:
                    predicted[index] = token
            if self.is_bio:
                predicted = self._valid(predicted)
            records.append({"prediction": predicted, "label": tags.tolist()})
        return records

    def _valid(self, predicted: Sequence[int]) -> list[int]:
        labels = known_labels(self.labels, task=self.name)
        names = metrics.valid_bio([labels[index] for index in predicted])
        return [
            labels.index(name) if name in labels else index
            for name, index in zip(names, predicted, strict=True)
        ]

    def _score(self, records: Sequence[Record]) -> dict[str, float]:
        labels = known_labels(self.labels, task=self.name)
        predictions = np.array([i for record in records for i in record["prediction"]])
        references = np.array([i for record in records for i in record["label"]])
        scores = {
            "token_accuracy": metrics.accuracy(predictions, references),
            "baseline_majority_token_accuracy": metrics.majority_share(references),
        }
        if not self.is_bio:
            return {**scores, "macro_f1": metrics.macro_f1(predictions, references)}
        entities = metrics.entity_scores(
            ([labels[i] for i in record["prediction"]] for record in records),
            ([labels[i] for i in record["label"]] for record in records),
        )
        return {**entities, **scores}


def first_subwords(word_ids: Sequence[int | None]) -> list[int]:
    """Returns, per token, the index of the word which it begins, or -1."""
    before: int | None = None
    word: list[int] = []
    for index in word_ids:
        word.append(-1 if index is None or index == before else index)
        before = index
    return word


def needs_leading_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether words must carry the space before them to be tokenised as in running text.

    A byte-level BPE such as GPT-2's joins given words without space.
    """
    running = tokenizer("a b")["input_ids"]
    plain = tokenizer(["a", "b"], is_split_into_words=True)["input_ids"]
    spaced = tokenizer(["a", " b"], is_split_into_words=True)["input_ids"]
    return plain != running and spaced == running
