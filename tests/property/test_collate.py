"""Padded tensors hold each row's values in their places, and nothing else."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.data.collate import CollateSpec, collate
from dist_ft.data.shards import Columns

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda n: max(n) > 0)


@given(
    lengths=LENGTHS,
    others=st.data(),
    pad_side=st.sampled_from(["right", "left"]),
    dtype=st.sampled_from([np.int8, np.int32, np.int64, np.float32, np.float64]),
)
def test_every_value_is_in_its_place(
    lengths: list[int], others: st.DataObject, pad_side: str, dtype: type[np.generic]
) -> None:
    # Some list columns have as many entries as the row has tokens, others have other numbers.
    other = others.draw(
        st.one_of(
            st.just(lengths),
            st.permutations(lengths),
            st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths)),
        )
    )
    columns: Columns = {
        "input_ids": [np.arange(1, n + 1, dtype=np.int32) for n in lengths],
        "labels": [np.arange(50, 50 + n).astype(dtype) for n in other],
    }
    spec = CollateSpec(
        ragged={"input_ids": 7, "labels": -100},
        targets=("labels",),
        pad_side="left" if pad_side == "left" else "right",
    )
    inputs, targets = collate(columns, spec)
    for tensor, name, pad in (
        (inputs["input_ids"], "input_ids", 7),
        (targets["labels"], "labels", -100),
    ):
        rows = [np.asarray(row).tolist() for row in columns[name]]
        width = max(map(len, rows))
        blanks = [[pad] * (width - len(row)) for row in rows]
        pairs = zip(rows, blanks, strict=True)
        assert tensor.tolist() == [r + b if pad_side == "right" else b + r for r, b in pairs]
        floating = name == "labels" and np.issubdtype(dtype, np.floating)
        assert tensor.dtype == (torch.float32 if floating else torch.int64)
    mask = inputs["attention_mask"]
    assert mask.dtype == torch.int64
    assert mask.sum(dim=1).tolist() == lengths
    kept = inputs["input_ids"].where(mask == 1, 0)
    assert kept.sum(dim=1).tolist() == [n * (n + 1) // 2 for n in lengths]


def test_rows_longer_than_small_integers_count() -> None:
    lengths = [2**15 + 3, 5]
    columns: Columns = {"input_ids": [np.ones(n, dtype=np.int32) for n in lengths]}
    inputs, _ = collate(columns, CollateSpec(ragged={"input_ids": 0}))
    assert inputs["attention_mask"].sum(dim=1).tolist() == lengths
    assert inputs["input_ids"].sum(dim=1).tolist() == lengths
