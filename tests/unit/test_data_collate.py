import numpy as np
import pytest
import torch

from dist_ft.data.collate import CollateSpec, collate, kept_columns
from dist_ft.data.shards import Columns

COLUMNS: Columns = {
    "input_ids": [np.array([5, 6, 7], np.int32), np.array([8], np.int32)],
    "labels": [np.array([-100, 1, 2], np.int32), np.array([-100], np.int32)],
    "targets": [np.array([0.5, 1], np.float32), np.array([0, 0.25], np.float32)],
    "label": np.array([3, 4], np.int32),
    "score": np.array([0.5, 1.5], np.float64),
    "text": ["a", "b"],
}


def test_padding_dtypes_and_mask() -> None:
    spec = CollateSpec(
        ragged={"input_ids": 9, "labels": -100, "targets": 0.0},
        scalar=("label", "score"),
        inputs=("input_ids", "attention_mask"),
        targets=("labels", "targets", "label", "score"),
        kept=("text", "label", "input_ids"),
    )
    inputs, targets = collate(COLUMNS, spec)
    assert list(inputs) == ["input_ids", "attention_mask"]
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert targets["labels"].tolist() == [[-100, 1, 2], [-100, -100, -100]]
    assert targets["label"].tolist() == [3, 4]
    assert {t.dtype for t in inputs.values()} == {torch.int64}
    assert targets["labels"].dtype == targets["label"].dtype == torch.int64
    assert targets["targets"].dtype == targets["score"].dtype == torch.float32
    kept = kept_columns(COLUMNS, spec)
    assert kept["text"] == ["a", "b"]
    assert kept["label"] == [3, 4]
    assert kept["input_ids"][0].tolist() == [5, 6, 7]


def test_left_padding() -> None:
    spec = CollateSpec(ragged={"input_ids": 9}, pad_side="left")
    inputs, targets = collate(COLUMNS, spec)
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert targets == {}


def test_tensors_do_not_alias_the_columns() -> None:
    spec = CollateSpec(
        ragged={"input_ids": 0}, scalar=("label",), inputs=("input_ids",), targets=("label",)
    )
    one: Columns = {"input_ids": [np.arange(3)], "label": np.array([7])}
    inputs, targets = collate(one, spec)
    inputs["input_ids"].zero_()
    targets["label"].zero_()
    assert [list(row) for row in one["input_ids"]] == [[0, 1, 2]]
    assert list(one["label"]) == [7]


def test_mistakes_in_the_spec() -> None:
    with pytest.raises(ValueError, match=r"'label'.*neither ragged nor scalar"):
        CollateSpec(ragged={"input_ids": 0}, targets=("label",))
    with pytest.raises(ValueError, match="pad_side"):
        CollateSpec(ragged={"input_ids": 0}, pad_side="middle")  # type: ignore[arg-type]
    spec = CollateSpec(ragged={"input_ids": 0}, scalar=("absent",), targets=("absent",))
    with pytest.raises(ValueError, match="'absent' is not in the shards"):
        collate(COLUMNS, spec)
