"""Numbers from every rank to every rank."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from dist_ft import dist, messages
from tests.helpers.run_distributed import run_distributed

LARGE = 2**62 - 5  # as a plan's hash; not to be told from its neighbours in fp64


def _numbers() -> None:
    rank, world = dist.rank(), dist.world_size()
    for most in (messages.MOST_RANKS, 1):  # by messages, and by a collective
        with mock.patch.object(messages, "MOST_RANKS", most):
            parts = [0.1 * (rank + 1), 1e16 if rank == 0 else -1e16 / (world - 1), float(rank)]
            sums = dist.all_reduce_sum(parts)
            assert dist.all_gather_object(sums) == [sums] * world
            assert sums[0] == pytest.approx(0.05 * world * (world + 1), rel=1e-12)
            assert sums[2] == world * (world - 1) / 2
            largest = dist.all_reduce_max([LARGE - rank, -(LARGE - rank), 7 if rank == 1 else 0])
            assert largest == [LARGE, -(LARGE - world + 1), 7]
            assert dist.all_reduce_sum([float("nan"), 1.0])[1] == world
    found = messages.from_every_rank(torch.tensor([rank, 10 * rank]))
    assert found.tolist() == [[r, 10 * r] for r in range(world)]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_rank_comes_to_the_same_numbers(world_size: int) -> None:
    run_distributed(_numbers, world_size=world_size)


def _in_turn() -> None:
    """What one rank asks for twice before another answers once is not mixed up."""
    rank = dist.rank()
    for turn in range(50):
        if rank == turn % dist.world_size():
            torch.mm(torch.ones(200, 200), torch.ones(200, 200))
        assert dist.all_reduce_sum([float(turn)]) == [float(turn * dist.world_size())]
        assert dist.all_reduce_max([turn + rank]) == [turn + dist.world_size() - 1]


def test_one_answer_follows_another() -> None:
    run_distributed(_in_turn, world_size=3)
