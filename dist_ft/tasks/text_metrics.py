"""Scores of generated texts: ROUGE by rouge-score, BLEU by sacrebleu, exact match.

Every row keeps what its texts add to each score, so that a data set, or a bootstrap resample of it,
is scored by sums.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from dist_ft.tasks.metrics import exact_match

NAMES = ("rouge_l", "rouge_1", "rouge_2", "bleu", "exact_match")
_ROUGE = {"rouge_l": "rougeL", "rouge_1": "rouge1", "rouge_2": "rouge2"}
# Han and kana, written without spaces.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


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


class _Words:
    """Splits a text for ROUGE: as rouge-score does where it is English, which drops all else."""

    def tokenize(self, text: str) -> list[str]:
        """Returns words, and single characters of what is written without spaces."""
        return _TOKEN.findall(text.lower())


@functools.cache
def _scorers() -> tuple[Any, Any, Any]:
    """ROUGE, and BLEU for texts with spaces and for Chinese and Japanese ones."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    rouge = RougeScorer(list(_ROUGE.values()), tokenizer=_Words())
    return rouge, BLEU(effective_order=True), BLEU(effective_order=True, tokenize="zh")


def statistics(text: str, reference: str) -> dict[str, Any]:
    """Returns what a generated text adds to the scores, JSON-able.

    Args:
        text: generated.
        reference: what it should be.
    """
    rouge, spaced, unspaced = _scorers()
    found = rouge.score(reference, text)
    bleu = unspaced if re.search(f"[{_UNSPACED}]", reference) else spaced
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
