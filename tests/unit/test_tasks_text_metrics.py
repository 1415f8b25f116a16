"""Generated texts are scored as rouge-score and sacrebleu score them, whatever is summed when."""

import importlib
import sys
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from dist_ft.tasks import text_metrics

TEXTS = ["the cat sat on the mat today", "Ada wrote it", "a", ""]
WANTED = ["the cat sat on a mat today", "Ada Lovelace wrote it.", "something else", "said nothing"]


def test_sums_of_rows_are_the_corpus_scores_of_the_libraries() -> None:
    records = [text_metrics.statistics(t, w) for t, w in zip(TEXTS, WANTED, strict=True)]
    found = text_metrics.scores(records)
    corpus = BLEU().corpus_score(TEXTS, [WANTED])
    assert found["bleu"] == pytest.approx(corpus.score / 100)
    assert 0 < found["bleu"] < 1
    scorer = RougeScorer(["rougeL", "rouge1"])
    pairs = [scorer.score(w, t) for t, w in zip(TEXTS, WANTED, strict=True)]
    assert found["rouge_l"] == pytest.approx(sum(p["rougeL"].fmeasure for p in pairs) / 4)
    assert found["rouge_1"] == pytest.approx(sum(p["rouge1"].fmeasure for p in pairs) / 4)
    assert found.keys() == set(text_metrics.NAMES)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = importlib.reload(text_metrics)  # nothing is cached yet
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(RuntimeError, match=r"tasks\.x\.max_new_tokens: .*dist-ft\[metrics\]"):
        module.check_installed(task="x")


@pytest.mark.parametrize(
    "text",
    ["мама мыла раму сегодня утром", "今天天气很好我们去公园", "über Nacht fiel später Schnee"],
)
def test_a_text_in_any_script_is_the_same_as_itself(text: str) -> None:
    found = text_metrics.scores([text_metrics.statistics(text, text)])
    assert found == pytest.approx(dict.fromkeys(text_metrics.NAMES, 1.0))
    other = text_metrics.scores([text_metrics.statistics(text[: len(text) // 2], text)])
    assert all(0 < other[name] < 1 for name in ("rouge_l", "rouge_1", "rouge_2"))
    assert other["bleu"] < 1
