"""Metrics as plain functions of predictions and references."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Span = tuple[str, int, int]


def accuracy(predictions: Ints, references: Ints) -> float:
    """Returns the share of equal entries."""
    return float((predictions == references).mean())


def single_label_scores(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the scores of records with a ``prediction`` and a ``label``, class indices."""
    predicted = np.array([record["prediction"] for record in records], np.int64)
    expected = np.array([record["label"] for record in records], np.int64)
    return {
        "accuracy": accuracy(predicted, expected),
        "macro_f1": macro_f1(predicted, expected),
        "mcc": matthews_correlation(predicted, expected),
        "baseline_majority_accuracy": majority_share(expected),
    }


def majority_share(references: Ints) -> float:
    """Returns the accuracy of always predicting the most frequent reference."""
    return float(np.unique(references, return_counts=True)[1].max() / len(references))


def macro_f1(predictions: Ints, references: Ints) -> float:
    """Returns the mean F1 over the classes that are predicted or referenced at least once."""
    scores = []
    for label in np.union1d(predictions, references):
        hits = int(((predictions == label) & (references == label)).sum())
        total = int((predictions == label).sum() + (references == label).sum())
        scores.append(2 * hits / total)
    return float(np.mean(scores))


def matthews_correlation(predictions: Ints, references: Ints) -> float:
    """Returns the multi-class MCC (Gorodkin 2004); 0 where a side is constant."""
    labels = np.union1d(predictions, references)
    predicted = np.array([(predictions == label).sum() for label in labels], dtype=np.float64)
    referenced = np.array([(references == label).sum() for label in labels], dtype=np.float64)
    count, hits = len(references), float((predictions == references).sum())
    covariance = hits * count - predicted @ referenced
    spread = (count**2 - predicted @ predicted) * (count**2 - referenced @ referenced)
    return float(covariance / np.sqrt(spread)) if spread > 0 else 0.0


def precision_recall_f1(*, hits: int, predicted: int, referenced: int) -> dict[str, float]:
    """Returns precision, recall and F1; 0 where nothing is predicted or referenced."""
    return {
        "precision": hits / predicted if predicted else 0.0,
        "recall": hits / referenced if referenced else 0.0,
        "f1": 2 * hits / (predicted + referenced) if predicted + referenced else 0.0,
    }


def multi_label_f1(predictions: Ints, references: Ints) -> dict[str, float]:
    """Returns micro-F1, macro-F1 (over labels that occur) and the share of exactly right rows.

    Args:
        predictions: 0 or 1, int64 [rows, labels].
        references: likewise.
    """
    hits = (predictions & references).sum(0)
    totals = predictions.sum(0) + references.sum(0)
    occurs = totals > 0
    return {
        "micro_f1": float(2 * hits.sum() / totals.sum()) if occurs.any() else 0.0,
        "macro_f1": float((2 * hits[occurs] / totals[occurs]).mean()) if occurs.any() else 0.0,
        "exact_match": float((predictions == references).all(1).mean()),
    }


def pearson(predictions: Floats, references: Floats) -> float:
    """Returns the linear correlation; 0 where a side is constant."""
    left, right = predictions - predictions.mean(), references - references.mean()
    spread = float(np.sqrt((left @ left) * (right @ right)))
    return float(left @ right / spread) if spread > 0 else 0.0


def spearman(predictions: Floats, references: Floats) -> float:
    """Returns the rank correlation, ties with their mean rank."""
    return pearson(_ranks(predictions), _ranks(references))


def _ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def entity_spans(tags: Sequence[str]) -> set[Span]:
    """Returns the entities (type, first word, last word) of BIO tags.

    An ``I-`` that continues no entity of its type begins one, as in conlleval and in seqeval's
    default mode.
    """
    spans: set[Span] = set()
    kind, first = "", 0
    for index, tag in enumerate([*tags, "O"]):
        mark, _, this = tag.partition("-")
        if kind and (mark != "I" or this != kind):
            spans.add((kind, first, index - 1))
            kind = ""
        if mark in ("B", "I") and not kind:
            kind, first = this, index
    return spans


def valid_bio(tags: Sequence[str]) -> list[str]:
    """Returns the tags with every ``I-`` that continues no entity of its type turned to ``B-``."""
    valid: list[str] = []
    before = "O"
    for tag in tags:
        mark, _, kind = tag.partition("-")
        follows = before != "O" and before.partition("-")[2] == kind
        valid.append(f"B-{kind}" if mark == "I" and not follows else tag)
        before = tag
    return valid


def entity_scores(
    predictions: Iterable[Sequence[str]], references: Iterable[Sequence[str]]
) -> dict[str, float]:
    """Returns entity-level precision, recall and F1: type and both ends must be right."""
    hits = predicted = referenced = 0
    for left, right in zip(predictions, references, strict=True):
        found, wanted = entity_spans(left), entity_spans(right)
        hits += len(found & wanted)
        predicted += len(found)
        referenced += len(wanted)
    return precision_recall_f1(hits=hits, predicted=predicted, referenced=referenced)


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Returns a text as SQuAD compares it: no case, punctuation, articles or extra space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Returns 1 if the normalised prediction equals a reference; no reference means no answer."""
    wanted = [normalise_answer(reference) for reference in references] or [""]
    return float(normalise_answer(prediction) in wanted)


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """Returns the best F1 of the bags of normalised words (SQuAD, Rajpurkar et al. 2016)."""
    return max(_bag_f1(prediction, reference) for reference in list(references) or [""])


def _bag_f1(prediction: str, reference: str) -> float:
    left, right = normalise_answer(prediction).split(), normalise_answer(reference).split()
    if not left or not right:
        return float(left == right)
    hits = sum((Counter(left) & Counter(right)).values())
    return 2 * hits / (len(left) + len(right))
