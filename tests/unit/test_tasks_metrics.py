import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dist_ft.tasks.metrics as m

LABELS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


def arrays(pairs: list[tuple[int, int]]) -> tuple[m.Ints, m.Ints]:
    values = np.array(pairs, dtype=np.int64)
    return values[:, 0], values[:, 1]


def test_known_values_of_classification_metrics() -> None:
    predictions, references = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 2, 2, 0])
    assert m.accuracy(predictions, references) == pytest.approx(4 / 6)
    # by hand: class 0: 1 hit of 2 + 2, class 1: 1 of 1 + 2, class 2: 2 of 3 + 2
    assert m.macro_f1(predictions, references) == pytest.approx((2 / 4 + 2 / 3 + 4 / 5) / 3)
    # Gorodkin's formula: 4 hits of 6; products of the class counts sum to 12, 14 and 12
    assert m.matthews_correlation(predictions, references) == pytest.approx(12 / np.sqrt(22 * 24))
    assert m.majority_share(references) == pytest.approx(2 / 6)


@given(LABELS)
def test_perfect_predictions_score_one(pairs: list[tuple[int, int]]) -> None:
    _, references = arrays(pairs)
    assert m.accuracy(references, references) == 1
    assert m.macro_f1(references, references) == 1
    constant = len(set(references.tolist())) == 1
    assert m.matthews_correlation(references, references) == pytest.approx(0 if constant else 1)


@given(LABELS)
def test_binary_correlation_is_the_linear_one(pairs: list[tuple[int, int]]) -> None:
    predictions, references = (a % 2 for a in arrays(pairs))
    expected = m.pearson(predictions.astype(float), references.astype(float))
    assert m.matthews_correlation(predictions, references) == pytest.approx(expected, abs=1e-9)


def test_multi_label_scores() -> None:
    predictions = np.array([[1, 0, 0], [1, 1, 0]])
    references = np.array([[1, 0, 0], [0, 1, 0]])
    assert m.multi_label_f1(predictions, references) == {
        "micro_f1": pytest.approx(2 * 2 / 5),
        "macro_f1": pytest.approx((2 / 3 + 1) / 2),  # the last label never occurs
        "exact_match": 0.5,
    }


def test_correlations() -> None:
    left, right = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 4.0, 9.0, 16.0])
    assert m.spearman(left, right) == pytest.approx(1.0)
    assert m.pearson(left, right) == pytest.approx(float(np.corrcoef(left, right)[0, 1]))
    assert m.pearson(left, np.ones(4)) == 0.0
    # ties share their mean rank: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    assert m.spearman(np.array([1.0, 2.0, 2.0, 3.0]), left) == pytest.approx(
        float(np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1])
    )


def test_entities_need_type_and_both_ends() -> None:
    tags = ["B-A", "I-A", "O", "B-B", "B-B", "I-A"]
    assert m.entity_spans(tags) == {("A", 0, 1), ("B", 3, 3), ("B", 4, 4), ("A", 5, 5)}
    scores = m.entity_scores([["B-A", "O", "O", "B-B", "B-B", "B-A"]], [tags])
    assert scores == {"precision": 3 / 4, "recall": 3 / 4, "f1": 3 / 4}
    assert m.entity_scores([["O"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


@given(st.lists(st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B"]), max_size=12))
def test_valid_tags_have_the_same_entities_and_no_loose_inside(tags: list[str]) -> None:
    valid = m.valid_bio(tags)
    assert m.entity_spans(valid) == m.entity_spans(tags)
    before = "O"
    for tag in valid:
        if tag.startswith("I-"):
            assert before[2:] == tag[2:]
        before = tag
    assert m.valid_bio(valid) == valid


def test_answers_are_compared_as_in_squad() -> None:
    assert m.exact_match("The  Ada Lovelace!", ["ada lovelace"]) == 1
    assert m.exact_match("", []) == 1
    assert m.exact_match("ada", []) == 0
    assert m.token_f1("Ada of London", ["Ada Lovelace", "London"]) == pytest.approx(2 * 1 / (3 + 1))
    assert m.token_f1("", ["x"]) == 0
    assert m.token_f1("the", ["a"]) == 1  # both are empty after normalisation
