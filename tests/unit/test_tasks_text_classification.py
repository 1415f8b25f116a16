from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from dist_ft.data.loader import MicroBatch
from dist_ft.tasks import TASKS, build_task
from dist_ft.tasks.text_classification import TextClassification
from tests.helpers.batches import batches, numbered, prepared, records
from tests.helpers.tiny_tokenizers import byte_level, wordpiece

TOKENIZER = wordpiece()
ROWS = [
    {"text": "Ada wrote a program", "label": "fact"},
    {"text": "Who wrote it?", "label": "question"},
    {"text": "did it love the program", "label": "question"},
    {"text": "it in the program", "label": "fact"},
    {"text": "ada", "label": "fact"},
]


def ready(**settings: Any) -> TextClassification:
    task = TextClassification(name="t", **settings)
    return task.with_state(task.scan(ROWS)) if task.needs_scan else task


def test_labels_are_found_in_the_training_rows() -> None:
    task = TextClassification(name="t")
    state = task.scan(ROWS)
    assert state == {"labels": ["fact", "question"]}
    updates = task.with_state(state).config_updates()
    assert updates["id2label"] == {0: "fact", 1: "question"}
    assert updates["problem_type"] == "single_label_classification"


def test_number_labels_are_ordered_by_value() -> None:
    task = TextClassification(name="t")
    rows = [{"text": "x", "label": label} for label in (10, 9, -1, 100)]
    assert task.scan(rows)["labels"] == ["-1", "9", "10", "100"]


def test_class_numbers_stand_for_given_names_but_never_for_other_numbers() -> None:
    named = TextClassification(name="t", labels=["neg", "pos"])
    features = named.encode(numbered([{"text": "x", "label": 1}]), tokenizer=TOKENIZER)
    assert features[0]["labels"] == 1
    numbers = TextClassification(name="t", labels=["0", "2", "5"])
    with pytest.raises(ValueError, match="label '1' is not known"):
        numbers.encode(numbered([{"text": "x", "label": 1}]), tokenizer=TOKENIZER)


def test_features_of_a_text() -> None:
    feature = ready().encode(numbered(ROWS), tokenizer=TOKENIZER)[1]
    tokens = TOKENIZER.convert_ids_to_tokens(feature["input_ids"])
    assert tokens == ["[CLS]", "who", "wrote", "it", "?", "[SEP]"]
    assert (feature["labels"], feature["loss_count"], feature["source_row"]) == (1, 1, 1)
    assert feature["truncated_tokens"] == 0


def test_features_of_a_pair_mark_the_second_text() -> None:
    task = TextClassification(name="t", text_pair="other", labels=["a", "b"])
    row = {"text": "who", "other": "ada", "label": "a"}
    feature = task.encode(numbered([row]), tokenizer=TOKENIZER)[0]
    assert feature["token_type_ids"] == [0, 0, 0, 1, 1]
    assert task.required_columns == ("text", "other", "label")
    assert task.dedupe_key(row) != task.dedupe_key({**row, "other": "it"})


def test_long_texts_are_cut_and_counted() -> None:
    task = ready(max_length=8)
    rows = numbered([{"text": "ada " * 10, "label": "fact"}, ROWS[4]])
    features = task.encode(rows, tokenizer=TOKENIZER)
    assert [len(f["input_ids"]) for f in features] == [8, 3]
    assert [f["truncated_tokens"] for f in features] == [4, 0]
    assert features[0]["input_ids"][-1] == TOKENIZER.sep_token_id


def test_losses_are_sums_of_the_usual_ones() -> None:
    logits = torch.randn(3, 4, dtype=torch.bfloat16)
    labels = torch.tensor([0, 3, 1])
    single = ready().loss({"logits": logits}, {"labels": labels})
    assert single.sum.dtype == torch.float32
    assert single.count == 3
    torch.testing.assert_close(single.sum / 3, cross_entropy(logits.float(), labels))

    hot = torch.tensor([[1, 0, 0, 1]] * 3)
    multi = TextClassification(name="t", problem="multi_label").loss(
        {"logits": logits}, {"labels": hot}
    )
    expected = binary_cross_entropy_with_logits(logits.float(), hot.float())
    torch.testing.assert_close(multi.sum / 3, expected)

    numbers = torch.tensor([0.5, -1.0, 2.0])
    regression = TextClassification(name="t", problem="regression").loss(
        {"logits": logits[:, :1]}, {"labels": numbers}
    )
    errors = logits[:, 0].float() - numbers
    torch.testing.assert_close(regression.sum, (errors**2).sum())


def by_first_letter(batch: MicroBatch) -> dict[str, torch.Tensor]:
    """A classifier that says "question" for texts that begin with "who" or "did"."""
    words = TOKENIZER.convert_tokens_to_ids(["who", "did"])
    says = torch.isin(batch.inputs["input_ids"][:, 1], torch.tensor(words)).float()
    return {"logits": torch.stack([1 - says, says], 1)}


def always_fact(batch: MicroBatch) -> dict[str, torch.Tensor]:
    return {"logits": torch.tensor([[1.0, 0.0]]).repeat(len(batch.rows), 1)}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_metrics_do_not_depend_on_the_number_of_ranks(tmp_path: Path, world_size: int) -> None:
    task = ready()
    data = prepared(task, ROWS, tokenizer=TOKENIZER, folder=tmp_path)
    perfect = records(
        task, data, forward=by_first_letter, tokenizer=TOKENIZER, world_size=world_size
    )
    assert len(perfect) == 5
    scores = task.new_metrics().compute(perfect)
    assert scores["accuracy"] == scores["macro_f1"] == scores["mcc"] == 1
    assert scores["baseline_majority_accuracy"] == pytest.approx(3 / 5)
    constant = records(task, data, forward=always_fact, tokenizer=TOKENIZER, world_size=world_size)
    assert task.new_metrics().compute(constant)["accuracy"] == pytest.approx(3 / 5)
    assert task.new_metrics().compute(constant)["mcc"] == 0


def test_several_labels_end_to_end(tmp_path: Path) -> None:
    rows = [
        {"text": "ada", "label": ["x", "y"]},
        {"text": "ada wrote", "label": []},
        {"text": "ada wrote it", "label": ["y"]},
    ]
    task = TextClassification(name="t", problem="multi_label")
    task = task.with_state(task.scan(rows))
    data = prepared(task, rows, tokenizer=TOKENIZER, folder=tmp_path)
    batch = batches(task, data, tokenizer=TOKENIZER, size=3)[0]
    assert batch.targets["labels"].tolist() == [[0, 1], [0, 0], [1, 1]]  # longest first

    def forward(batch: MicroBatch) -> dict[str, torch.Tensor]:
        return {"logits": batch.targets["labels"].float() - 0.5}

    scores = task.new_metrics().compute(
        records(task, data, forward=forward, tokenizer=TOKENIZER, world_size=2)
    )
    assert scores == {"micro_f1": 1, "macro_f1": 1, "exact_match": 1}


def test_regression_end_to_end(tmp_path: Path) -> None:
    rows = [{"text": "ada " * n, "label": n / 2} for n in range(1, 6)]
    task = TextClassification(name="t", problem="regression")
    data = prepared(task, rows, tokenizer=TOKENIZER, folder=tmp_path)

    def forward(batch: MicroBatch) -> dict[str, torch.Tensor]:
        return {"logits": batch.targets["labels"][:, None] * 2}

    scores = task.new_metrics().compute(records(task, data, forward=forward, tokenizer=TOKENIZER))
    assert scores["pearson"] == pytest.approx(1)
    assert scores["mse"] == pytest.approx(sum((n / 2) ** 2 for n in range(1, 6)) / 5)
    assert task.primary_metric == ("mse", False)
    assert task.config_updates()["problem_type"] == "regression"


def test_fillers_give_no_records(tmp_path: Path) -> None:
    task = ready()
    data = prepared(task, ROWS[:3], tokenizer=TOKENIZER, folder=tmp_path)
    last = batches(task, data, tokenizer=TOKENIZER, size=2, rank=2, world_size=3)
    metrics = task.new_metrics()
    for batch in last:
        metrics.update(always_fact(batch), batch)
    assert metrics.records() == []
    with pytest.raises(ValueError, match="at least one row"):
        metrics.compute([])


def test_models_without_token_types_get_none() -> None:
    task = ready()
    assert "token_type_ids" in task.collate_spec(TOKENIZER, evaluation=False).inputs
    assert "token_type_ids" not in task.collate_spec(byte_level(), evaluation=False).inputs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"problem": "ranking"}, r"tasks\.t\.problem"),
        ({"metric": "f2"}, r"tasks\.t\.metric: 'f2' is not one of accuracy"),
        ({"labels": ["a"]}, "at least two"),
        ({"labels": ["a", "a"]}, "at least two different"),
        ({"problem": "regression", "labels": ["a", "b"]}, "regression has none"),
    ],
)
def test_impossible_settings_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextClassification(name="t", **settings)


@pytest.mark.parametrize(
    ("settings", "row", "message"),
    [
        ({}, {"text": "x", "label": "new"}, "label 'new' is not known"),
        ({}, {"text": 3, "label": "fact"}, "must hold text"),
        ({}, {"text": "x", "label": 0.5}, "a label must be"),
        ({"max_length": 600}, {"text": "x", "label": "fact"}, "more than the model's 512"),
        ({"max_length": 2}, {"text": "x", "label": "fact"}, "at least 8"),
        ({"problem": "multi_label", "labels": ["a", "b"]}, {"text": "x", "label": "a"}, "lists"),
        ({"problem": "regression"}, {"text": "x", "label": "abc"}, "finite numbers"),
    ],
)
def test_bad_rows_are_errors(settings: dict[str, Any], row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ready(**settings).encode(numbered([row]), tokenizer=TOKENIZER)


def test_a_column_that_holds_no_labels_is_an_error() -> None:
    task = TextClassification(name="t")
    with pytest.raises(ValueError, match="at least 2"):
        task.scan([{"text": "x", "label": "a"}] * 3)
    with pytest.raises(ValueError, match="more than 1000"):
        task.scan([{"text": "x", "label": str(n)} for n in range(2000)])
    with pytest.raises(ValueError, match="not known yet"):
        task.config_updates()


def test_tasks_are_built_by_type() -> None:
    assert set(TASKS) == {
        "text_classification", "token_classification", "question_answering", "generation",
        "image_classification",
        "audio_classification",
    }  # fmt: skip
    built = build_task({"type": "text_classification", "name": "x", "max_length": 9})
    assert built == TextClassification(name="x", max_length=9)
    with pytest.raises(ValueError, match="type 'sorting' is not one of"):
        build_task({"type": "sorting", "name": "x"})
    with pytest.raises(ValueError, match="no setting 'lenght'"):
        build_task({"type": "text_classification", "name": "x", "lenght": 9})
