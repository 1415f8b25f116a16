"""What a row must have is looked at before it counts, and what comes out has a version."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from dist_ft.config_data import DataConfig, SourceConfig
from dist_ft.config_tasks import (
    GenerationConfig,
    QuestionAnsweringConfig,
    TextClassificationConfig,
    TokenClassificationConfig,
)
from dist_ft.data.prepare import prepare_split
from dist_ft.data.shards import ShardedDataset
from dist_ft.tasks import build_task
from dist_ft.tasks.text_classification import TextClassification
from dist_ft.tasks.token_classification import TokenClassification
from dist_ft.train.augmentation import make_augmenter
from dist_ft.train.data import selected_rows, task_spec
from tests.helpers.batches import numbered
from tests.helpers.tiny_tokenizers import wordpiece

TOKENIZER = wordpiece()
# Version and digest of what tasks make of the rows below: shards of another are not used again.
GOLDEN = {
    "text": (1, "ee64385271cfd982"),
    "tags": (1, "b5c88edf7a15d2da"),
    "answers": (2, "5de18a47a90829ff"),
    "causal": (1, "9c7226005c48cbb9"),
    "seq2seq": (1, "8ff1dcdd7fc0cdb6"),
}
TEXTS = [{"text": " Who wrote it? ", "label": "b"}, {"text": "Ada", "label": "a"}]
TAGGED = [{"tokens": ["Ada", "wrote", "it"], "tags": ["B-PER", "O", "O"]}]
ASKED = [
    {
        "id": str(n),
        "question": "who wrote it ?",
        "context": "the program . Ada wrote it in love . " * 3,
        "answers": {"text": texts, "answer_start": starts},
    }
    for n, (texts, starts) in enumerate([(["Ada"], [14]), ([" Ada "], [13]), ([], [])])
]
SAID = [{"prompt": "who wrote it ?", "response": "Ada wrote it"}]


MADE: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "text": (
        {"type": "text_classification", "labels": ["a", "b"], "max_length": 8}, TEXTS,
    ),
    "tags": ({"type": "token_classification", "labels": ["O", "B-PER"]}, TAGGED),
    "answers": ({"type": "question_answering", "max_length": 20, "doc_stride": 4}, ASKED),
    "causal": ({"type": "generation", "max_length": 16, "max_target_length": 8}, SAID),
    "seq2seq": ({"type": "generation", "style": "seq2seq", "max_target_length": 8}, SAID),
}  # fmt: skip


def test_what_rows_become_has_a_version() -> None:
    found: dict[str, tuple[int, str]] = {}
    for name, (settings, rows) in MADE.items():
        task = build_task({"name": "t", **settings})
        features = task.encode(numbered(rows), tokenizer=TOKENIZER)
        text = json.dumps(features, sort_keys=True, default=lambda value: value.tolist())
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        found[name] = (getattr(task, "encoding_version", 1), digest)
    assert found == GOLDEN, "rows are encoded otherwise: raise the task's encoding_version, too"


def data_of(folder: Path, rows: list[dict[str, Any]]) -> DataConfig:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(train=SourceConfig(path=str(path)))


def test_a_row_that_is_refused_hides_none_of_its_text(tmp_path: Path) -> None:
    rows = [
        {"text": "hello", "label": "??"},
        {"text": "hello", "label": "a"},
        {"text": "it", "label": "b"},
    ]
    config = TextClassificationConfig(
        type="text_classification", name="t", data=data_of(tmp_path, rows), labels=["a", "b"],
        on_error="skip",
    )  # fmt: skip
    task = build_task(config.arguments())
    spec = task_spec(config, task, tokenizer=TOKENIZER, own={}, split="train")
    found = prepare_split(spec, split="train", data_dir=tmp_path / "data")
    assert len(ShardedDataset(found.folder, verify="hash")) == 2
    assert found.manifest.selection["invalid"] == 1
    assert found.manifest.selection["duplicates"] == 0
    kept = selected_rows(config, task, tokenizer=TOKENIZER, split="train")
    assert [row["label"] for row in kept] == ["a", "b"]


def test_a_programs_own_encoding_is_not_checked_by_ours(tmp_path: Path) -> None:
    class Own(TextClassification):
        def encode(self, rows: Any, *, tokenizer: Any) -> Any:
            return super().encode([{**row, "label": "a"} for row in rows], tokenizer=tokenizer)

    config = TextClassificationConfig(
        type="text_classification", name="t", on_error="skip",
        data=data_of(tmp_path, [{"text": "hello", "label": "??"}]), labels=["a", "b"],
    )  # fmt: skip
    for kind, rows in ((Own, 1), (TextClassification, 0)):
        task = kind(name="t", labels=["a", "b"])
        spec = task_spec(config, task, tokenizer=TOKENIZER, own={}, split="train")
        assert len(list(spec.raw_rows("train"))) == rows


def test_the_version_of_an_encoding_is_part_of_what_rows_depend_on(tmp_path: Path) -> None:
    config = QuestionAnsweringConfig(
        type="question_answering", name="t", data=data_of(tmp_path, ASKED)
    )
    spec = task_spec(config, build_task(config.arguments()), tokenizer=TOKENIZER, own={})
    assert spec.arguments["encoding"] == 2


@pytest.mark.parametrize(
    ("kind", "settings", "rows", "message"),
    [
        (QuestionAnsweringConfig, {"answers": "anwsers"}, ASKED, "has no column 'anwsers'"),
        (GenerationConfig, {"context": "inputs"}, SAID, "has no column 'inputs'"),
    ],
)
def test_a_column_that_rows_may_leave_empty_must_be_there(
    tmp_path: Path, kind: Any, settings: dict[str, Any], rows: list[Any], message: str
) -> None:
    name = "question_answering" if rows is ASKED else "generation"
    config = kind(type=name, name="t", data=data_of(tmp_path, rows), **settings)
    task = build_task(config.arguments())
    spec = task_spec(config, task, tokenizer=TOKENIZER, own={}, split="train")
    with pytest.raises(ValueError, match=message):
        prepare_split(spec, split="train", data_dir=tmp_path / "data")


def test_a_class_number_is_no_place_among_labels_that_were_found() -> None:
    rows = [{"text": t, "label": t} for t in ("neutral", "entailment", "contradiction")]
    task = TextClassification(name="t")
    found = task.with_state(task.scan(rows))
    found.check_row(rows[0])
    with pytest.raises(ValueError, match=r"label '0' is a number where .* list tasks\.t\.labels"):
        found.check_row({"text": "x", "label": 0})
    listed = TextClassification(name="t", labels=["entailment", "neutral", "contradiction"])
    listed.check_row({"text": "x", "label": 0})


def test_labels_that_are_one_number_have_one_order() -> None:
    assert TextClassification(name="t").scan(
        [{"text": "x", "label": label} for label in ("1", "01", "001", "2")]
    ) == {"labels": ["001", "01", "1", "2"]}


@pytest.mark.parametrize(
    ("labels", "tags"),
    [
        (("O", "B-PER", "E-PER", "S-PER"), ("B-PER", "E-PER", "O", "O")),
        (("O", "B-PER", "I-PER", "X"), ("B-PER", "I-PER", "O", "O")),
    ],
)
def test_entities_of_any_tags_stay_whole(
    tmp_path: Path, labels: tuple[str, ...], tags: tuple[str, ...]
) -> None:
    row = {"tokens": ["Angela", "Merkel", "spoke", "twice"], "tags": list(tags)}
    config = TokenClassificationConfig.model_validate(
        {
            "type": "token_classification",
            "name": "t",
            "data": data_of(tmp_path, [row]),
            "augmentation": [{"type": "word_dropout", "share": 0.6}],
        }
    )
    task = TokenClassification(name="t", labels=labels)
    dataset: Any = None
    augmenter = make_augmenter(config.augmentation, config=config, task=task, dataset=dataset)
    after = [augmenter.apply(row, seed=0, epoch=0, row=n)[0] for n in range(40)]
    assert all(changed["tokens"][:2] == ["Angela", "Merkel"] for changed in after)
    assert any(len(changed["tokens"]) < 4 for changed in after)
