import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from dist_ft.data.loader import MicroBatch
from dist_ft.tasks.answer_spans import best_span, first_sentence, score_answers
from dist_ft.tasks.question_answering import QuestionAnswering
from tests.helpers.batches import batches, numbered, prepared, records
from tests.helpers.tiny_tokenizers import byte_level, wordpiece

TOKENIZER = wordpiece()
TASK = QuestionAnswering(name="qa", max_length=20, doc_stride=4, max_answer_length=5)
LONG = "It did it. " + "the program " * 8 + "Ada Lovelace wrote it in love."


def row(question: str, context: str, *answers: str) -> dict[str, Any]:
    starts = [context.index(answer) for answer in answers]
    return {
        "id": question,
        "question": question,
        "context": context,
        "answers": {"text": list(answers), "answer_start": starts},
    }


ROWS = [
    row("who wrote it?", LONG, "Ada Lovelace", "Ada"),
    row("who?", "Ada did it."),
    row("did who?", "The program did.", "program"),
]


def features(*rows: dict[str, Any], task: QuestionAnswering = TASK) -> list[dict[str, Any]]:
    return task.encode(numbered(rows), tokenizer=TOKENIZER)


def text_at(feature: dict[str, Any], start: int, end: int) -> str:
    return feature["context"][feature["offset_start"][start] : feature["offset_end"][end]]


def test_windows_cover_the_context_and_share_tokens() -> None:
    found = features(ROWS[0])
    assert len(found) > 2
    covered: list[tuple[int, int]] = []
    for index, feature in enumerate(found):
        assert len(feature["input_ids"]) <= TASK.max_length
        spans = [
            (start, end)
            for start, end in zip(feature["offset_start"], feature["offset_end"], strict=True)
            if start >= 0
        ]
        if index:
            assert len(set(spans) & set(covered)) == TASK.doc_stride
        covered += spans
    words = {LONG[start:end] for start, end in covered}
    assert {"Ada", "Love", "lace", "program", "."} <= words
    assert max(end for _, end in covered) == len(LONG)


def test_answer_is_in_some_window_and_elsewhere_it_is_at_cls() -> None:
    found = features(ROWS[0])
    texts = set()
    for feature in found:
        start, end = feature["start_position"], feature["end_position"]
        if start == feature["null_position"]:
            assert (start, end) == (0, 0)
        else:
            texts.add(text_at(feature, start, end))
    assert texts == {"Ada Lovelace"}
    assert {feature["loss_count"] for feature in found} == {1}
    assert {feature["source_row"] for feature in found} == {0}


def test_a_sign_beside_the_answer_is_not_part_of_it() -> None:
    (feature,) = features(row("who?", "did (Ada) it", "Ada"))
    assert text_at(feature, feature["start_position"], feature["end_position"]) == "Ada"


def test_unanswerable_question_has_its_answer_at_cls() -> None:
    (feature,) = features(ROWS[1])
    assert (feature["start_position"], feature["end_position"]) == (0, 0)
    for answers in (None, {"text": [], "answer_start": []}):
        (same,) = features({**ROWS[1], "answers": answers})
        assert same["answers"] == "[]"


def test_candidates_are_context_and_cls() -> None:
    (feature,) = features(ROWS[1])
    tokens = TOKENIZER.convert_ids_to_tokens(feature["input_ids"])
    assert tokens == ["[CLS]", "who", "?", "[SEP]", "ada", "did", "it", ".", "[SEP]"]
    assert feature["candidates"] == [1, 0, 0, 0, 1, 1, 1, 1, 0]
    assert feature["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1, 1, 1]


WORD = st.sampled_from(["ada", "wrote", "the", "program", "lovelace", "é1", "x.y", "—", "a  b"])


@given(st.lists(WORD, min_size=1, max_size=40), st.data())
def test_every_labelled_span_is_the_answer_up_to_token_borders(
    words: list[str], data: st.DataObject
) -> None:
    context = " ".join(words)
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, min(first + 2, len(words) - 1)))
    start = len(" ".join(words[:first])) + (first > 0)
    answer = " ".join(words[first : last + 1])
    raw = {
        "question": "who?", "context": context,
        "answers": {"text": [answer], "answer_start": [start]},
    }  # fmt: skip
    spans = [(f, f["start_position"], f["end_position"]) for f in features(raw)]
    labelled = [(f, a, b) for f, a, b in spans if a != f["null_position"]]
    for feature, begin, end in labelled:
        assert feature["offset_start"][begin] == start
        assert text_at(feature, begin, end) == answer
    shared = TASK.doc_stride
    if len(TOKENIZER(answer, add_special_tokens=False)["input_ids"]) <= shared:
        assert labelled  # an answer no longer than the overlap is whole in some window


def test_long_questions_are_cut_to_leave_room() -> None:
    (feature, *_) = features(row("who " * 30, "ada did it.", "ada"))
    question = [t for t in feature["input_ids"] if t == TOKENIZER.convert_tokens_to_ids("who")]
    assert len(question) == TASK.max_length // 4


def test_tokenizer_without_cls_uses_the_first_token() -> None:
    task = QuestionAnswering(name="qa", max_length=64, doc_stride=8)
    (feature,) = task.encode(numbered([ROWS[1]]), tokenizer=byte_level())
    assert feature["null_position"] == 0
    assert feature["start_position"] == 0


def test_loss_ignores_question_and_padding() -> None:
    (feature,) = features(ROWS[2])
    candidates = torch.tensor([feature["candidates"] + [0, 0]])
    targets = {
        "candidates": candidates,
        "start_position": torch.tensor([feature["start_position"]]),
        "end_position": torch.tensor([feature["end_position"]]),
    }
    logits = torch.randn(1, candidates.shape[1])
    outputs = {"start_logits": logits, "end_logits": logits * 2}
    loss = TASK.loss(outputs, targets)
    inside = candidates[0].bool()
    expected = -(
        logits[0, inside].log_softmax(0)[inside[: feature["start_position"]].sum()]
        + (2 * logits[0, inside]).log_softmax(0)[inside[: feature["end_position"]].sum()]
    )
    torch.testing.assert_close(loss.sum, expected / 2)
    assert loss.count == 1
    noise = torch.where(candidates == 0, torch.randn_like(logits) * 50, logits)
    again = TASK.loss({"start_logits": noise, "end_logits": noise * 2}, targets)
    torch.testing.assert_close(again.sum, loss.sum)


FLOATS = st.floats(-10, 10, width=32)


@given(
    st.lists(st.tuples(FLOATS, FLOATS, st.booleans()), min_size=1, max_size=12), st.integers(1, 5)
)
def test_best_span_is_that_of_an_exhaustive_search(
    tokens: list[tuple[float, float, bool]], longest: int
) -> None:
    starts = np.array([t[0] for t in tokens], np.float32)
    ends = np.array([t[1] for t in tokens], np.float32)
    allowed = np.array([t[2] for t in tokens])
    spans = [
        (float(starts[a]) + float(ends[b]), a, b)
        for a in range(len(tokens))
        for b in range(a, min(a + longest, len(tokens)))
        if allowed[a] and allowed[b]
    ]
    score, first, last = best_span(starts, ends, allowed=allowed, longest=longest)
    if not spans:
        assert (first, last) == (-1, -1)
    else:
        assert score == max(spans)[0]
        assert (score, first, last) in spans


def oracle(batch: MicroBatch) -> dict[str, torch.Tensor]:
    """Logits that are high at the labelled positions."""
    width = batch.inputs["input_ids"].shape[1]
    one_hot = torch.nn.functional.one_hot
    return {
        "start_logits": 9 * one_hot(batch.targets["start_position"], width).float(),
        "end_logits": 9 * one_hot(batch.targets["end_position"], width).float(),
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_perfect_logits_give_perfect_answers(tmp_path: Path, world_size: int) -> None:
    data = prepared(TASK, ROWS, tokenizer=TOKENIZER, folder=tmp_path)
    found = records(TASK, data, forward=oracle, tokenizer=TOKENIZER, world_size=world_size)
    assert len(found) == len(data) > len(ROWS)
    scores = TASK.new_metrics().compute(found)
    assert scores["questions"] == 3
    assert scores["answered"] == pytest.approx(2 / 3)
    # long windows without the answer vote for CLS with 18, as does the right one for its span
    assert scores["baseline_no_answer_f1"] == pytest.approx(1 / 3)
    assert scores["exact_match"] >= 2 / 3


def window(example: int, **values: Any) -> dict[str, Any]:
    base = {"example": example, "score": 1.0, "null_score": 0.0, "text": "ada", "answers": ["Ada"]}
    return {**base, "first_sentence": "Ada did it.", **values}


def test_windows_are_joined_by_best_span_and_least_null_score() -> None:
    windows = [
        window(0, score=2.0, null_score=9.0, text="program"),
        window(0, score=5.0, null_score=1.0, text="ada"),
        window(1, score=1.0, null_score=3.0, answers=[]),
        window(2, score=1.0, null_score=3.0, answers=["Ada"]),
    ]
    scores = score_answers(windows)
    assert scores["exact_match"] == pytest.approx(2 / 3)
    assert scores["answerable_exact_match"] == pytest.approx(1 / 2)
    assert scores["answered"] == pytest.approx(1 / 3)
    assert scores["baseline_first_sentence_f1"] == pytest.approx((0.5 + 0 + 0.5) / 3)


def test_decoding_uses_the_offsets_and_bars_the_question(tmp_path: Path) -> None:
    data = prepared(TASK, ROWS[2:], tokenizer=TOKENIZER, folder=tmp_path)
    (batch,) = batches(TASK, data, tokenizer=TOKENIZER)
    logits = torch.zeros(1, batch.inputs["input_ids"].shape[1])
    logits[0, 1] = 99.0  # a token of the question
    logits[0, 6] = 5.0  # "program"
    metrics = TASK.new_metrics()
    metrics.update({"start_logits": logits, "end_logits": logits}, batch)
    (record,) = metrics.records()
    assert record["text"] == "program"
    assert record["score"] == 10.0
    assert json.loads(json.dumps(record)) == record


def test_first_sentence() -> None:
    assert first_sentence(" It did. Then?") == "It did."
    assert first_sentence("no end") == "no end"


def test_questions_about_one_context_stay_together() -> None:
    other = {**ROWS[0], "question": "what?"}
    assert TASK.split_key(other) == TASK.split_key(ROWS[0])
    assert TASK.dedupe_key(other) != TASK.dedupe_key(ROWS[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": {"text": ["Bob"], "answer_start": [0]}}, "does not have the answer 'Bob'"),
        ({"answers": {"text": ["Ada"], "answer_start": []}}, "1 texts and 0 answer_start"),
        ({"answers": ["Ada"]}, "objects with lists"),
        ({"context": None}, "must hold text"),
    ],
)
def test_bad_rows_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        features({**ROWS[1], **change})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 20, "doc_stride": 11}, "must be less than the 11 context tokens"),
        ({"doc_stride": -1}, "doc_stride"),
        ({"max_answer_length": 0}, "max_answer_length"),
        ({"metric": "bleu"}, "is not one of f1"),
    ],
)
def test_impossible_settings_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuestionAnswering(name="qa", **settings)


@pytest.mark.parametrize(
    ("answer", "in_tokens"), [("Paris ", "Paris"), (" Paris", "Paris"), ("\n Paris\n", "Paris")]
)
def test_white_space_around_an_answer_is_not_missed(answer: str, in_tokens: str) -> None:
    before, after = ("" if answer[i].isspace() else " " for i in (0, -1))
    context = f"in{before}{answer}{after}when"
    (feature,) = features(row("where?", context, answer))
    assert text_at(feature, feature["start_position"], feature["end_position"]) == in_tokens


def test_an_accent_that_the_tokenizer_drops_does_not_cut_the_answer_off() -> None:
    tokenizer = wordpiece()
    backend: Any = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.BertNormalizer(strip_accents=True)
    answer = unicodedata.normalize("NFD", "program\u0301")
    for context in (f"the {answer} did it", f"the {answer}"):
        raw = numbered([row("what?", context, answer)])
        (feature,) = TASK.encode(raw, tokenizer=tokenizer)
        assert feature["start_position"] != feature["null_position"]
        assert text_at(feature, feature["start_position"], feature["end_position"]) == "program"


def test_an_answer_of_nothing_but_white_space_is_none() -> None:
    (feature,) = features(row("where?", "in  when", "  "))
    assert feature["start_position"] == feature["end_position"] == feature["null_position"]
