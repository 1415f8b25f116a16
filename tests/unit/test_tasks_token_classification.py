from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, one_hot
from transformers import PreTrainedTokenizerBase

from dist_ft.data.loader import MicroBatch
from dist_ft.tasks.token_classification import TokenClassification
from tests.helpers.batches import batches, numbered, prepared, records
from tests.helpers.tiny_tokenizers import byte_level, wordpiece

TOKENIZER = wordpiece()
LABELS = ["O", "B-PER", "I-PER", "B-LOC"]
TASK = TokenClassification(name="ner", labels=LABELS)
ROWS = [
    {"tokens": ["Ada", "Lovelace", "wrote", "it"], "tags": ["B-PER", "I-PER", "O", "O"]},
    {"tokens": ["in", "London"], "tags": ["O", "B-LOC"]},
    {"tokens": ["who", "did", "it", "?"], "tags": ["O", "O", "O", "O"]},
]


def test_first_subwords_carry_the_labels() -> None:
    feature = TASK.encode(numbered(ROWS), tokenizer=TOKENIZER)[0]
    tokens = TOKENIZER.convert_ids_to_tokens(feature["input_ids"])
    assert tokens == ["[CLS]", "ada", "love", "##lace", "wrote", "it", "[SEP]"]
    assert feature["labels"] == [-100, 1, 2, -100, 0, 0, -100]
    assert feature["word"] == [-1, 0, 1, -1, 2, 3, -1]
    assert feature["tags"] == [1, 2, 0, 0]
    assert feature["loss_count"] == 4


def test_words_cut_off_have_no_loss_but_keep_their_tags() -> None:
    short = TokenClassification(name="ner", labels=LABELS, max_length=8)
    row = {"tokens": ["it"] * 10, "tags": ["O"] * 9 + ["B-LOC"]}
    feature = short.encode(numbered([row, ROWS[1]]), tokenizer=TOKENIZER)[0]
    assert (len(feature["input_ids"]), feature["loss_count"]) == (8, 6)
    assert feature["truncated_tokens"] == 4
    assert feature["tags"][-1] == 3


def test_words_without_a_token_have_no_loss() -> None:
    row = {"tokens": ["it", "\u200b", "did"], "tags": ["O", "B-PER", "B-LOC"]}
    feature = TASK.encode(numbered([row]), tokenizer=TOKENIZER)[0]
    assert feature["word"] == [-1, 0, 2, -1]
    assert feature["labels"] == [-100, 0, 3, -100]


WORDS = st.lists(st.text("abcdefg .,é", min_size=1, max_size=6), min_size=1, max_size=8)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, byte_level()], ids=["wordpiece", "byte_level"])
@given(words=WORDS)
def test_every_word_with_a_token_is_labelled_once_in_order(
    tokenizer: PreTrainedTokenizerBase, words: list[str]
) -> None:
    row = {"tokens": words, "tags": [LABELS[i % 4] for i in range(len(words))]}
    feature = TASK.encode(numbered([row]), tokenizer=tokenizer)[0]
    labelled = [(w, label) for w, label in zip(feature["word"], feature["labels"], strict=True)]
    chosen = [(w, label) for w, label in labelled if w >= 0]
    assert [w for w, _ in chosen] == sorted({w for w, _ in chosen})
    assert all(label == feature["tags"][w] for w, label in chosen)
    assert all((w >= 0) == (label != -100) for w, label in labelled)
    assert feature["loss_count"] == len(chosen)


def test_byte_level_words_are_tokenised_as_in_running_text() -> None:
    tokenizer = byte_level()
    feature = TASK.encode(numbered([ROWS[1]]), tokenizer=tokenizer)[0]
    assert feature["input_ids"] == tokenizer("in London")["input_ids"]
    assert [w for w in feature["word"] if w >= 0] == [0, 1]


def test_labels_are_found_with_outside_first() -> None:
    task = TokenClassification(name="ner")
    state = task.scan(ROWS)
    assert state == {"labels": ["O", "B-LOC", "B-PER", "I-PER"]}
    assert task.with_state(state).is_bio
    assert task.with_state(state).primary_metric == ("f1", True)
    plain = TokenClassification(name="pos", labels=["NN", "VB"])
    assert not plain.is_bio
    assert plain.primary_metric == ("token_accuracy", True)


def test_loss_is_the_sum_over_labelled_tokens() -> None:
    logits = torch.randn(2, 5, 4, dtype=torch.bfloat16)
    labels = torch.tensor([[-100, 1, 2, -100, -100], [-100, 0, 3, 1, -100]])
    loss = TASK.loss({"logits": logits}, {"labels": labels})
    mean = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert (loss.count, loss.sum.dtype) == (5, torch.float32)
    torch.testing.assert_close(loss.sum / 5, mean)


def saying(words: dict[int, int]) -> Any:
    """A tagger that gives the n-th labelled word of each row the label ``words[n]`` or O."""

    def forward(batch: MicroBatch) -> dict[str, torch.Tensor]:
        labels = batch.targets["labels"]
        chosen = torch.zeros_like(labels)
        for row, kept in enumerate(batch.kept["word"]):
            for token, word in enumerate(kept.tolist()):
                chosen[row, token] = words.get(word, 0)
        return {"logits": one_hot(chosen, 4).float()}

    return forward


@pytest.mark.parametrize("world_size", [1, 2])
def test_entities_end_to_end(tmp_path: Path, world_size: int) -> None:
    data = prepared(TASK, ROWS, tokenizer=TOKENIZER, folder=tmp_path)
    found = records(
        TASK, data, forward=saying({0: 1, 1: 2}), tokenizer=TOKENIZER, world_size=world_size
    )
    assert [record["prediction"] for record in found] == [[1, 2, 0, 0], [1, 2], [1, 2, 0, 0]]
    scores = TASK.new_metrics().compute(found)
    # one right entity, three predicted, two referenced
    assert scores["precision"] == pytest.approx(1 / 3)
    assert scores["recall"] == pytest.approx(1 / 2)
    assert scores["f1"] == pytest.approx(2 / 5)
    assert scores["token_accuracy"] == pytest.approx((4 + 0 + 2) / 10)
    assert scores["baseline_majority_token_accuracy"] == pytest.approx(7 / 10)


def test_predictions_are_valid_tags(tmp_path: Path) -> None:
    data = prepared(TASK, ROWS, tokenizer=TOKENIZER, folder=tmp_path)
    found = records(TASK, data, forward=saying({1: 2}), tokenizer=TOKENIZER)
    assert [record["prediction"] for record in found] == [[0, 1, 0, 0], [0, 1], [0, 1, 0, 0]]


def test_entities_cut_off_count_as_missed(tmp_path: Path) -> None:
    task = TokenClassification(name="ner", labels=LABELS, max_length=8)
    row = {"tokens": ["it"] * 9 + ["ada"], "tags": ["O"] * 9 + ["B-PER"]}
    data = prepared(task, [row], tokenizer=TOKENIZER, folder=tmp_path)
    found = records(task, data, forward=saying({9: 1}), tokenizer=TOKENIZER)
    assert task.new_metrics().compute(found)["recall"] == 0


def test_plain_labels_are_scored_by_token(tmp_path: Path) -> None:
    task = TokenClassification(name="pos", labels=["NN", "VB", "XX", "YY"])
    rows = [{"tokens": ["ada", "wrote", "it"], "tags": ["NN", "VB", "NN"]}]
    data = prepared(task, rows, tokenizer=TOKENIZER, folder=tmp_path)
    found = records(task, data, forward=saying({1: 1, 2: 1}), tokenizer=TOKENIZER)
    scores = task.new_metrics().compute(found)
    assert scores["token_accuracy"] == pytest.approx(2 / 3)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert "f1" not in scores


def test_training_batches_keep_nothing(tmp_path: Path) -> None:
    data = prepared(TASK, ROWS, tokenizer=TOKENIZER, folder=tmp_path)
    assert TASK.collate_spec(TOKENIZER, evaluation=False).kept == ()
    batch = batches(TASK, data, tokenizer=TOKENIZER, size=3)[0]
    assert batch.targets["labels"].shape == batch.inputs["input_ids"].shape


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "it"], "tags": ["O"]}, "2 words and 1 tags"),
        ({"tokens": [], "tags": []}, "0 words"),
        ({"tokens": "ada", "tags": ["O"]}, "must hold lists"),
        ({"tokens": [1], "tags": ["O"]}, "lists of text"),
        ({"tokens": ["ada"], "tags": ["B-NEW"]}, "'B-NEW' is not known"),
    ],
)
def test_bad_rows_are_errors(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TASK.encode(numbered([row]), tokenizer=TOKENIZER)
