import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.data.collate import CollateSpec, collate
from dist_ft.data.packing import filled_share, first_fit, packed_layout

SPEC = CollateSpec(
    ragged={"input_ids": 0, "token_type_ids": 0, "labels": -100, "flags": 0},
    scalar=("start_position",),
    inputs=("input_ids", "attention_mask", "token_type_ids"),
    targets=("labels", "flags", "start_position"),
    packed=True,
    per_row=("flags",),
)


def columns_of(lengths: list[int]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "input_ids": [rng.integers(1, 99, n, dtype=np.int32) for n in lengths],
        "token_type_ids": [np.arange(n, dtype=np.int8) % 2 for n in lengths],
        "labels": [np.arange(n, dtype=np.int32) for n in lengths],
        "flags": [np.array([1, 0, 1], dtype=np.int8) for _ in lengths],
        "start_position": np.array([n - 1 for n in lengths], dtype=np.int32),
    }


@given(
    lengths=st.lists(st.integers(1, 64), max_size=200),
    capacity=st.integers(64, 200),
    open_bins=st.integers(1, 20),
)
def test_first_fit_packs_each_sample_once(
    lengths: list[int], capacity: int, open_bins: int
) -> None:
    bins = first_fit(lengths, capacity=capacity, open_bins=open_bins)
    places = [place for members in bins for place in members.tolist()]
    assert sorted(places) == list(range(len(lengths)))
    sizes = np.array(lengths, dtype=np.int64)
    for members in bins:
        assert 0 < sizes[members].sum() <= capacity
        assert (np.diff(members) > 0).all()
    # A bin is only opened for a sample that the one before has no room for.
    fills = [int(sizes[members].sum()) for members in bins]
    assert all(one + other > capacity for one, other in itertools.pairwise(fills))


def test_packing_wastes_less_than_one_percent() -> None:
    rng = np.random.default_rng(1)
    lengths = np.clip(np.round(rng.lognormal(np.log(43), 0.8, 20_000)), 1, 512).astype(np.int64)
    for capacity in (512, 2048):
        bins = first_fit(lengths, capacity=capacity)
        assert filled_share(lengths, bins=bins, capacity=capacity) >= 0.99
    nearly = first_fit(lengths, capacity=512, open_bins=1)
    assert filled_share(lengths, bins=nearly, capacity=512) < 0.92


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=20))
def test_layout_says_where_samples_are(lengths: list[int]) -> None:
    layout = packed_layout(lengths)
    assert layout.cu_seqlens.dtype == np.int32
    assert layout.cu_seqlens.tolist() == [0, *np.cumsum(lengths).tolist()]
    assert layout.position_ids.tolist() == [i for n in lengths for i in range(n)]
    assert layout.starts.tolist() == layout.cu_seqlens[:-1].tolist()
    assert layout.max_seqlen == max(lengths)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=20))
def test_packed_tensors_hold_the_rows(lengths: list[int]) -> None:
    columns = columns_of(lengths)
    inputs, targets = collate(columns, SPEC)
    assert set(inputs) == {
        "input_ids", "token_type_ids", "position_ids", "cu_seqlens", "max_seqlen"
    }  # fmt: skip
    total = sum(lengths)
    assert {tuple(inputs[n].shape) for n in ("input_ids", "token_type_ids", "position_ids")} == {
        (1, total)
    }
    assert inputs["input_ids"].dtype == inputs["position_ids"].dtype == torch.int64
    assert inputs["cu_seqlens"].dtype == torch.int32
    assert int(inputs["max_seqlen"]) == max(lengths)
    ends = inputs["cu_seqlens"].tolist()
    for place, (start, end) in enumerate(itertools.pairwise(ends)):
        for name, tensors in (("input_ids", inputs), ("labels", targets)):
            assert tensors[name][0, start:end].tolist() == columns[name][place].tolist()
        assert int(targets["sample_starts"][place]) == start
        # A place in a row stays one: the row's start is added by whoever reads it.
        at = start + int(targets["start_position"][place])
        assert inputs["input_ids"][0, at] == columns["input_ids"][place][-1]
    assert targets["flags"].tolist() == [[1, 0, 1]] * len(lengths)


def test_bad_packing() -> None:
    with pytest.raises(ValueError, match=r"sample 1 has 9 tokens, but a bin holds 8: .* never cut"):
        first_fit([1, 9], capacity=8)
    with pytest.raises(ValueError, match="open_bins must be at least 1"):
        first_fit([1], capacity=8, open_bins=0)
    for lengths in ([], [3, 0]):
        with pytest.raises(ValueError, match="samples of at least 1 token"):
            packed_layout(lengths)
    with pytest.raises(ValueError, match="too long for 32-bit"):
        packed_layout([2**31])
    with pytest.raises(ValueError, match="packing needs the ragged column 'input_ids'"):
        CollateSpec(ragged={"input_ids": 0}, pad_side="left", packed=True)
    unlisted = CollateSpec(
        ragged={"input_ids": 0, "flags": 0},
        inputs=("input_ids",),
        targets=("flags",),
        packed=True,
    )
    with pytest.raises(ValueError, match="column 'flags' can't be packed"):
        collate(columns_of([4, 5]), unlisted)
