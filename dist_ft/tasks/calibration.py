"""Whether a model is right as often as it is sure, and what it takes for what."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def reliability(confidence: Floats, correct: Floats, *, bins: int = 10) -> dict[str, Any]:
    """Returns the expected calibration error and the points of a reliability diagram.

    Predictions are put into bins of equal width by their confidence; the error is the mean over
    predictions of their bin's distance between mean confidence and share that is right (Guo et al.
    2017, section 2).

    Args:
        confidence: probability of each chosen class, [choices].
        correct: 1 where the choice is right, else 0, [choices].
        bins: number of bins.

    Returns:
        ``ece`` and ``bins``, those that are not empty: ``confidence``, ``accuracy``, ``count``.
    """
    places = np.clip((confidence * bins).astype(np.int64), 0, bins - 1)
    found: list[dict[str, float]] = []
    for place in range(bins):
        chosen = places == place
        if chosen.any():
            found.append(
                {
                    "confidence": float(confidence[chosen].mean()),
                    "accuracy": float(correct[chosen].mean()),
                    "count": int(chosen.sum()),
                }
            )
    total = max(1, len(confidence))
    ece = sum(b["count"] / total * abs(b["confidence"] - b["accuracy"]) for b in found)
    return {"ece": ece, "bins": found}


def confusion_matrix(predictions: Ints, references: Ints, *, classes: int) -> list[list[int]]:
    """Returns how often each class was taken for which: rows are references."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (references, predictions), 1)
    return counts.tolist()
