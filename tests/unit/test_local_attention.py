"""Local attention, which rows without padding do not have: never taken for full attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dist_ft.kernels.unpadded_attention import RowRuns, unpadded_attention
from dist_ft.train.trunk_passes import _windows


def _attend(lengths: list[int], **kwargs: Any) -> torch.Tensor:
    module: Any = nn.Module()
    module.row_source = SimpleNamespace(rows=SimpleNamespace(runs=RowRuns.of(lengths)), flash=False)
    q = torch.randn(1, 2, sum(lengths), 8)
    return unpadded_attention(module, q, q, q, None, **kwargs)[0]


@pytest.mark.parametrize("window", [None, 4, 5])
def test_a_window_that_holds_every_row_changes_nothing(window: int | None) -> None:
    torch.manual_seed(0)
    plain = _attend([4, 3])
    torch.manual_seed(0)
    assert torch.equal(_attend([4, 3], sliding_window=window), plain)


def test_a_row_that_is_longer_than_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"passes \['sliding_window'\] to its attention"):
        _attend([4, 3], sliding_window=3)


def test_windows_of_parts_are_found() -> None:
    inner: Any = nn.Module()
    inner.config = SimpleNamespace(local_attention=128)
    backbone: Any = nn.Sequential(inner, nn.Linear(2, 2))
    backbone.config = SimpleNamespace(is_encoder_decoder=True, sliding_window=None)
    model: Any = SimpleNamespace(backbone=backbone)
    assert _windows(model) == [128]
    inner.sliding_window = 65
    assert sorted(_windows(model)) == [65, 128]
