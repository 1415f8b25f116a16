"""Ranks that meet: only those of the same start."""

from __future__ import annotations

import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYetError
from unittest import mock

import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from dist_ft import dist
from dist_ft.dist import World
from tests.helpers.run_distributed import run_distributed


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> ThreadPoolExecutor:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    return ThreadPoolExecutor(4)


def come(pool: ThreadPoolExecutor, rank: int, *, within_s: float = 30) -> Future[TCPStore]:
    return pool.submit(dist._meet, World(rank, 0, 2), join_timeout_s=within_s)


def test_a_restarted_rank_waits_for_the_new_rank_0(pool: ThreadPoolExecutor) -> None:
    before = [come(pool, rank) for rank in (0, 1)]
    stores = [f.result(timeout=30) for f in before]
    restarted = come(pool, 1)
    with pytest.raises(NotYetError):  # the old rank 0 is busy, and its store still there
        restarted.result(timeout=2)
    before.clear()
    stores.clear()
    newest = come(pool, 0)
    newest.result(timeout=30).set("from", "the new rank 0")
    assert restarted.result(timeout=30).get("from") == b"the new rank 0"


def test_two_ranks_of_one_number_are_told(pool: ThreadPoolExecutor) -> None:
    first, second = come(pool, 0), come(pool, 1)
    stores = [f.result(timeout=30) for f in (first, second)]
    began = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"only ranks of an earlier start.*rank 1 had come.*NODE"
    ):
        come(pool, 1, within_s=1).result(timeout=30)
    assert time.monotonic() - began < 10
    assert len(stores) == 2


def _in_a_group_for_gpus() -> None:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    world = dist.World(rank, rank, world_size)
    # gloo stands in for NCCL, which has no backend for numbers of the host.
    with (
        mock.patch.object(torch.distributed, "get_backend_config", return_value="cuda:nccl"),
        mock.patch.object(
            torch.distributed, "all_reduce", wraps=torch.distributed.all_reduce
        ) as sums,
        dist.process_group(world, timeout_s=60, join_timeout_s=60),
    ):
        assert dist.all_reduce_max([rank]) == [world_size - 1]
        assert dist.all_reduce_sum([1.0]) == [world_size]
        groups = [call.kwargs["group"] for call in sums.call_args_list]
    assert all(group is not None for group in groups)
    assert dist.all_reduce_max([rank]) == [world_size - 1]


def test_a_callers_group_for_gpus_is_no_obstacle() -> None:
    run_distributed(_in_a_group_for_gpus, world_size=2)


def test_deepspeed_on_another_device_than_torch_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(ValueError, match=r"DS_ACCELERATOR: .* got cpu where torch finds a GPU"):
        dist.init_process_group(World(0, 0, 1), timeout_s=1, join_timeout_s=1)
