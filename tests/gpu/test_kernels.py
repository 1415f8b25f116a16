"""Every kernel that is made for this GPU is right on it: what `dist-ft kernels check` looks at."""

import pytest
import torch

from dist_ft.kernels.checking import check_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]


def test_nothing_is_wrong() -> None:
    found = list(check_kernels(torch.device("cuda", 0), timed=False))
    assert [f for f in found if f.state == "wrong"] == []
    right = {f.implementation for f in found if f.state == "right"}
    assert {"flash_varlen", "by_run", "chunked", "triton"} <= right
