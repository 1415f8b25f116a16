"""Extractive question answering: windows over long contexts, unanswerable questions, SQuAD scores.

A question whose answer is not in a window, or nowhere, has its answer at the CLS token (Devlin et
al. 2019, section 4.3).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dist_ft.data.collate import CollateSpec
from dist_ft.tasks.answer_spans import best_span, first_sentence, score_answers
from dist_ft.tasks.base import (
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
    model_inputs,
    text_of,
    token_types,
)

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

    from dist_ft.data.loader import MicroBatch

_METRICS = {"f1": True, "exact_match": True, "answerable_f1": True, "answerable_exact_match": True}
_SPECIAL_TOKENS = 4  # CLS, one or two SEP between the texts, SEP


@dataclass(frozen=True)
class QuestionAnswering(NoGeneration):
    """The task type ``question_answering``.

    Attributes:
        name: name in the recipe.
        question: column of the question.
        context: column of the text that holds the answer.
        answers: column of the answers: ``{"text": [...], "answer_start": [...]}``, empty lists or
            null for an unanswerable question. Training uses the first.
        id: column of an identifier; only copied.
        max_length: longest window in tokens, the question included.
        doc_stride: tokens that neighbouring windows share (as in transformers' run_qa).
        max_answer_length: longest answer in tokens.
        metric: primary metric.
    """

    name: str
    question: str = "question"
    context: str = "context"
    answers: str = "answers"
    id: str = "id"
    max_length: int = 384
    doc_stride: int = 128
    max_answer_length: int = 30
    metric: str | None = None

    type = "question_answering"
    auto_class = "AutoModelForQuestionAnswering"
    needs_scan = False
    # 2: answers with white space around them, or without an accent of the context, have a place.
    encoding_version = 2

    def __post_init__(self) -> None:
        room = self.max_length - self._question_tokens - _SPECIAL_TOKENS
        if not 0 <= self.doc_stride < room:
            raise ValueError(
                f"tasks.{self.name}.doc_stride: {self.doc_stride} must be less than the {room} "
                f"context tokens that a window of max_length {self.max_length} has for sure"
            )
        if self.max_answer_length < 1:
            raise ValueError(
                f"tasks.{self.name}.max_answer_length: must be at least 1, got "
                f"{self.max_answer_length}"
            )
        _ = self.primary_metric

    @property
    def required_columns(self) -> tuple[str, ...]:
        """Columns of the raw rows that must have a value; answers may be null."""
        return (self.question, self.context)

    @property
    def primary_metric(self) -> tuple[str, bool]:
        """Name of the metric that decides, and whether more is better."""
        return choose_metric(self.metric, task=self.name, known=_METRICS)

    def scan(self, rows: Iterable[Row]) -> dict[str, Any]:
        """Returns nothing: there are no labels to find."""
        del rows
        return {}

    def with_state(self, state: Mapping[str, Any]) -> Self:
        """Returns the task."""
        del state
        return self

    def config_updates(self) -> dict[str, Any]:
        """Returns the configuration values of the head."""
        return {"num_labels": 2}

    def schema(self) -> pa.Schema:
        """Returns the task's columns, without the base columns.

        ``candidates`` is 1 for tokens at which an answer may begin or end (context and CLS),
        ``offset_start`` and ``offset_end`` are character places in the context, -1 elsewhere.
        """
        integers = pa.list_(pa.int32())
        return pa.schema(
            [
                pa.field("token_type_ids", pa.list_(pa.int8())),
                pa.field("candidates", pa.list_(pa.int8())),
                pa.field("start_position", pa.int32()),
                pa.field("end_position", pa.int32()),
                pa.field("null_position", pa.int32()),
                pa.field("offset_start", integers),
                pa.field("offset_end", integers),
                pa.field("example_id", pa.string()),
                pa.field("context", pa.string()),
                pa.field("answers", pa.string()),
            ]
        )

    def split_key(self, row: Row) -> str:
        """Returns the context: its questions stay together."""
        return text_of(row, self.context).strip()

    def dedupe_key(self, row: Row) -> str:
        """Returns question and context."""
        return f"{text_of(row, self.question).strip()}\x1f{self.split_key(row)}"

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Checks that the settings and the tokenizer fit.

        Raises:
            ValueError: the model has fewer positions, or the tokenizer gives no offsets.
        """
        check_max_length(self.max_length, task=self.name, tokenizer=tokenizer)
        check_fast(tokenizer, task=self.name)

    def encode(self, rows: list[Row], *, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
        """Returns one feature per window, one or more per raw row.

        Raises:
            ValueError: the tokenizer gives no offsets, or an answer is not at its place.
        """
        self.check_tokenizer(tokenizer)
        answers = [self._answers(row) for row in rows]
        encoding = tokenizer(
            self._short_questions(rows, tokenizer=tokenizer),
            [text_of(row, self.context) for row in rows],
            truncation="only_second",
            max_length=self.max_length,
            stride=self.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        features = []
        numbers = encoding["overflow_to_sample_mapping"]
        for index, number in enumerate(numbers):
            window = _window(encoding, index, cls_token_id=tokenizer.cls_token_id)
            around = [None, *numbers, None][index : index + 3 : 2]
            outer = (around[0] != number, around[1] != number)
            features.append(
                {
                    **window,
                    **_target(window, answers[number], outer=outer),
                    "example_id": str(rows[number].get(self.id, "")),
                    "context": rows[number][self.context],
                    "answers": json.dumps([text for text, _ in answers[number]]),
                    "loss_count": 1,
                    "source_row": rows[number]["source_row"],
                }
            )
        return features

    def collate_spec(self, tokenizer: PreTrainedTokenizerBase, *, evaluation: bool) -> CollateSpec:
        """Returns the columns of a micro-batch and their padding."""
        kept = ("source_row", "null_position", "offset_start", "offset_end", "context", "answers")
        return CollateSpec(
            ragged={**input_padding(tokenizer), "candidates": 0},
            scalar=("start_position", "end_position"),
            inputs=model_inputs(tokenizer),
            targets=("candidates", "start_position", "end_position"),
            kept=kept if evaluation else (),
        )

    def loss(self, outputs: Any, targets: Mapping[str, Tensor]) -> LossSum:
        """Returns the mean of start and end cross-entropy, summed over windows, in float32.

        Both distributions are over the candidates only, so padding and question do not take part.

        Args:
            outputs: ``start_logits`` and ``end_logits`` [windows, tokens].
            targets: ``candidates`` int64 [windows, tokens], ``start_position`` and
                ``end_position`` int64 [windows].
        """
        losses = [
            torch.nn.functional.cross_entropy(choice.logits, choice.labels, reduction="sum")
            for choice in self.choices(outputs, targets)
        ]
        windows = targets["candidates"]
        total = torch.stack(losses).sum() / 2
        return LossSum(total, torch.tensor(len(windows), device=windows.device))

    def choices(self, outputs: Any, targets: Mapping[str, Tensor]) -> list[Choice]:
        """Returns the choices that the loss scores, start and end."""
        barred = targets["candidates"] == 0
        return [
            Choice(
                outputs[f"{side}_logits"].float().masked_fill(barred, -torch.inf),
                targets[f"{side}_position"],
            )
            for side in ("start", "end")
        ]

    def new_metrics(self) -> RecordMetrics:
        """Returns empty metrics."""
        return RecordMetrics(decode=self._decode, score=score_answers)

    @property
    def _question_tokens(self) -> int:
        """Longest question in tokens; longer ones are cut to leave the windows room."""
        return self.max_length // 4

    def _short_questions(
        self, rows: Sequence[Row], *, tokenizer: PreTrainedTokenizerBase
    ) -> list[str]:
        questions = [text_of(row, self.question).strip() for row in rows]
        encoding = tokenizer(
            questions,
            add_special_tokens=False,
            truncation=True,
            max_length=self._question_tokens,
            return_offsets_mapping=True,
        )
        ends = [max((end for _, end in row), default=0) for row in encoding["offset_mapping"]]
        return [question[:end] for question, end in zip(questions, ends, strict=True)]

    def check_row(self, row: Row) -> None:
        """Checks what encoding asks of the answers.

        Raises:
            ValueError: one is not where the row says.
        """
        self._answers(row)

    def _answers(self, row: Row) -> list[tuple[str, int]]:
        """The (text, first character) of each answer."""
        value, context = row.get(self.answers), text_of(row, self.context)
        if value is None:
            return []
        if not isinstance(value, Mapping) or not {"text", "answer_start"} <= value.keys():
            raise ValueError(
                f"tasks.{self.name}.answers: column {self.answers!r} must hold objects with lists "
                f"text and answer_start, got {value!r}"
            )
        texts, starts = list(value["text"] or ()), [int(s) for s in value["answer_start"] or ()]
        if len(texts) != len(starts):
            raise ValueError(
                f"tasks.{self.name}.answers: {len(texts)} texts and {len(starts)} answer_start"
            )
        for text, start in zip(texts, starts, strict=True):
            if not text or start < 0 or context[start : start + len(text)] != text:
                raise ValueError(
                    f"tasks.{self.name}.answers: the context does not have the answer {text!r} at "
                    f"character {start}"
                )
        return list(zip(texts, starts, strict=True))

    def _decode(self, outputs: Any, batch: MicroBatch, texts: Sequence[str] | None) -> list[Record]:
        del texts
        starts = outputs["start_logits"].float().cpu().numpy()
        ends = outputs["end_logits"].float().cpu().numpy()
        kept = batch.kept
        records: list[Record] = []
        for index in range(len(batch.rows)):
            context, null = kept["context"][index], int(kept["null_position"][index])
            first, last = kept["offset_start"][index], kept["offset_end"][index]
            score, begin, end = best_span(
                starts[index, : len(first)],
                ends[index, : len(first)],
                allowed=np.asarray(first) >= 0,
                longest=self.max_answer_length,
            )
            records.append(
                {
                    "example": int(kept["source_row"][index]),
                    "score": score,
                    "null_score": float(starts[index, null]) + float(ends[index, null]),
                    "text": context[int(first[begin]) : int(last[end])] if begin >= 0 else "",
                    "answers": json.loads(kept["answers"][index]),
                    "first_sentence": first_sentence(context),
                }
            )
        return records


def _window(encoding: BatchEncoding, index: int, *, cls_token_id: Any) -> dict[str, Any]:
    """A window's tokens and the places of its context tokens in the context."""
    ids = encoding["input_ids"][index]
    null = ids.index(cls_token_id) if cls_token_id in ids else 0
    starts, ends = [], []
    sides = encoding.encodings[index].sequence_ids if encoding.encodings else []
    for side, (start, end) in zip(sides, encoding["offset_mapping"][index], strict=True):
        inside = side == 1 and end > start
        starts.append(start if inside else -1)
        ends.append(end if inside else -1)
    return {
        "input_ids": ids,
        "token_type_ids": token_types(encoding, index),
        "candidates": [int(s >= 0 or i == null) for i, s in enumerate(starts)],
        "null_position": null,
        "offset_start": starts,
        "offset_end": ends,
    }


def _target(
    window: Mapping[str, Any], answers: Sequence[tuple[str, int]], *, outer: tuple[bool, bool]
) -> dict[str, int]:
    """Start and end token of the first answer; the null position if it is not in the window.

    Tokenizers leave out white space, and some of them accents: an answer that begins or ends with
    those has fewer characters in tokens than in the context.

    Args:
        window: the window.
        answers: (text, first character) of each answer.
        outer: whether the window is the first of its context, and whether it is the last.
    """
    null = window["null_position"]
    missing = {"start_position": null, "end_position": null}
    if not answers:
        return missing
    text, begin = answers[0]
    end = begin + len(text.rstrip())
    begin += len(text) - len(text.lstrip())
    inside = [i for i, start in enumerate(window["offset_start"]) if start >= 0]
    spans = enumerate(zip(window["offset_start"], window["offset_end"], strict=True))
    covering = [i for i, (start, stop) in spans if start >= 0 and start < end and stop > begin]
    if not covering:
        return missing
    first, last = covering[0], covering[-1]
    at_edge = first == inside[0] and not outer[0], last == inside[-1] and not outer[1]
    if at_edge[0] and window["offset_start"][first] > begin:
        return missing  # cut by the window's edge
    if at_edge[1] and window["offset_end"][last] < end:
        return missing
    return {"start_position": first, "end_position": last}
