"""Batches for a GPU come in page-locked memory."""

from pathlib import Path

import pytest
import torch

from dist_ft.data.loader import BatchPlan, StepLoader
from dist_ft.data.sampling import RoundRobin
from tests.helpers.datasets import SPEC, make_dataset


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_are_pinned(tmp_path: Path) -> None:
    loader = StepLoader(
        {"t": make_dataset(tmp_path / "t", lengths=[3, 5, 8, 2])},
        specs={"t": SPEC},
        plan=BatchPlan(4, 2, seed=0),
        mixture=RoundRobin(1),
        pin_memory=True,
    )
    steps = loader.iterate(0)
    batch = next(steps)
    steps.close()
    for micro in batch.micro_batches:
        tensors = [*micro.inputs.values(), *micro.targets.values()]
        assert tensors
        assert all(tensor.is_pinned() for tensor in tensors)
