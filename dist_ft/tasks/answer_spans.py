"""From start and end logits to answers, and the scores of answers over windows."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

import dist_ft.tasks.metrics as metrics
from dist_ft.tasks.base import Record


def best_span(
    starts: npt.NDArray[np.float32],
    ends: npt.NDArray[np.float32],
    *,
    allowed: npt.NDArray[np.bool_],
    longest: int,
) -> tuple[float, int, int]:
    """Returns the score, first and last token of the span with the highest sum of logits.

    Every span of allowed tokens up to the longest is looked at, not only an n-best list.

    Args:
        starts: logits for the first token, float32 [tokens].
        ends: logits for the last token, float32 [tokens].
        allowed: tokens of the context, bool [tokens].
        longest: longest span in tokens.

    Returns:
        (score, first, last); (-1e30, -1, -1) if no token is allowed.
    """
    if not allowed.any():
        return -1e30, -1, -1
    barred = -np.inf
    begin = np.where(allowed, starts, barred)
    stop = np.concatenate([np.where(allowed, ends, barred), np.full(longest - 1, barred)])
    windows = np.lib.stride_tricks.sliding_window_view(stop, longest)
    scores = begin[:, None] + windows  # [first token, length - 1]
    first, extra = np.unravel_index(int(scores.argmax()), scores.shape)
    return float(scores[first, extra]), int(first), int(first + extra)


def first_sentence(context: str) -> str:
    """Returns the first sentence of a text: a trivial answer to compare with."""
    return re.split(r"(?<=[.!?])\s", context.strip(), maxsplit=1)[0]


def score_answers(records: Sequence[Record]) -> dict[str, float]:
    """Returns SQuAD exact match and token F1, and those of trivial answers.

    The windows of an example are joined: the best span of all against the least null score. The
    baselines answer with nothing, and with the first sentence.

    Args:
        records: one per window, see ``QuestionAnswering``.
    """
    examples: dict[int, list[Record]] = {}
    for record in records:
        examples.setdefault(record["example"], []).append(record)
    rows: list[dict[str, float]] = []
    for windows in examples.values():
        best = max(windows, key=lambda record: record["score"])
        null = min(record["null_score"] for record in windows)
        text = best["text"] if best["score"] > null else ""
        answers = best["answers"]
        rows.append(
            {
                "answerable": float(bool(answers)),
                "exact_match": metrics.exact_match(text, answers),
                "f1": metrics.token_f1(text, answers),
                "answered": float(bool(text)),
                "baseline_no_answer_f1": metrics.token_f1("", answers),
                "baseline_first_sentence_f1": metrics.token_f1(best["first_sentence"], answers),
            }
        )
    answerable = [row for row in rows if row["answerable"]]
    keys = ("exact_match", "f1", "answered", "baseline_no_answer_f1", "baseline_first_sentence_f1")
    scores = {key: _mean([row[key] for row in rows]) for key in keys}
    return {
        **scores,
        "answerable_exact_match": _mean([row["exact_match"] for row in answerable]),
        "answerable_f1": _mean([row["f1"] for row in answerable]),
        "questions": float(len(rows)),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
