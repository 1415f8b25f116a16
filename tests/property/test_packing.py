import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.data.packing import filled_share, first_fit


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


def test_bad_packing() -> None:
    with pytest.raises(ValueError, match=r"sample 1 has 9 tokens, but a bin holds 8: .* never cut"):
        first_fit([1, 9], capacity=8)
    with pytest.raises(ValueError, match="open_bins must be at least 1"):
        first_fit([1], capacity=8, open_bins=0)
