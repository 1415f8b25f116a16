"""Scores of an evaluation, whose targets stay on the host, of logits on a GPU."""

from typing import Any

import pytest
import torch

from dist_ft.tasks import build_task

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_generated_tokens_are_scored_where_their_logits_are() -> None:
    task: Any = build_task({"name": "t", "type": "generation"})
    targets = {"labels": torch.tensor([[1, 2, 3]])}
    logits, labels = task._aligned({"logits": torch.zeros(1, 3, 5, device="cuda")}, targets)
    assert logits.device == labels.device
