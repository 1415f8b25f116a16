"""Scores of generated texts: ROUGE by rouge-score, BLEU by sacrebleu, exact match.

Every row keeps what its texts add to each score, so that a data set, or a bootstrap resample of it,
is scored by sums.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from dist_ft.tasks.metrics import exact_match

NAMES = ("rouge_l", "rouge_1", "rouge_2", "bleu", "exact_match")
_ROUGE = {"rouge_l": "rougeL", "rouge_1": "rouge1", "rouge_2": "rouge2"}


def check_installed(*, task: str) -> None:
    """Checks that the packages are there.

    Raises:
        RuntimeError: they are not.
    """
    try:
        _scorers()
    except ImportError as error:
        raise RuntimeError(
            f"tasks.{task}.max_new_tokens: generated texts are scored by the package "
            f"{error.name}, which is not installed: pip install 'dist-ft[metrics]', or leave "
            "max_new_tokens out"
        ) from error


@functools.cache
def _scorers() -> tuple[Any, Any]:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    return RougeScorer(list(_ROUGE.values())), BLEU(effective_order=True)


def statistics(text: str, reference: str) -> dict[str, Any]:
    """Returns what a generated text adds to the scores, JSON-able.

    Args:
        text: generated.
        reference: what it should be.
    """
    rouge, bleu = _scorers()
    found = rouge.score(reference, text)
    grams = bleu.sentence_score(text, [reference])
    return {
        **{name: found[key].fmeasure for name, key in _ROUGE.items()},
        "exact_match": exact_match(text, [reference]),
        "bleu": [*grams.counts, *grams.totals, grams.sys_len, grams.ref_len],
    }


def scores(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns mean ROUGE F1 (Lin 2004), exact match, and corpus BLEU (Papineni et al. 2002; Post
    2018), all from 0 to 1.

    Args:
        records: what ``statistics`` returned, at least one.
    """
    from sacrebleu.metrics.bleu import BLEU

    result = {name: float(np.mean([r[name] for r in records])) for name in NAMES if name != "bleu"}
    sums = np.sum([r["bleu"] for r in records], axis=0).tolist()
    orders = (len(sums) - 2) // 2
    bleu = BLEU.compute_bleu(
        correct=sums[:orders],
        total=sums[orders : 2 * orders],
        sys_len=sums[-2],
        ref_len=sums[-1],
        smooth_method="exp",
    )
    return {**result, "bleu": bleu.score / 100}
