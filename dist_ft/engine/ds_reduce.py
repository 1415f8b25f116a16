"""The gradient reduction of ZeRO 1 and 2 on CPUs: each rank gets the sums that it keeps."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ft.engine.exchange import sum_at_owners


def reduce_to_owners(zero: Any) -> None:
    """Let DeepSpeed's ZeRO-1/2 optimizer sum up each slice of a bucket on its owner alone.

    DeepSpeed all-reduces whole buckets, and every rank then drops what is not of its partitions.
    Here half as much is sent, and none of it twice. The other slices of the bucket stay what they
    were, as they do in DeepSpeed with ``reduce_scatter``: nothing reads them.

    Another optimizer, one that takes means, keeps its state elsewhere or looks for overflows
    (fp16), and one on a GPU, are left as they are.
    """
    if type(zero).__name__ != "DeepSpeedZeroOptimizer" or zero.cpu_offload or zero.gradient_average:
        return
    if zero.dtype == torch.float16:
        return
    if zero.bit16_groups_flat[0].is_cpu and dist.get_world_size(zero.dp_process_group) > 1:
        zero.gradient_reduction_w_predivide = functools.partial(_reduce, zero)


def _reduce(zero: Any, bucket: Tensor, communication_data_type: torch.dtype) -> Tensor:
    """Sum up a bucket (flat); return it in the type of the sums."""
    if not bucket.numel():  # what comes before a gradient larger than a bucket
        return bucket
    values = bucket.to(communication_data_type)
    slices = slices_by_owner(zero, values, parameters=zero.ipg_buckets[communication_data_type])
    sum_at_owners(slices, group=zero.dp_process_group)
    if values is not bucket:
        bucket.copy_(values)
    return values


def slices_by_owner(zero: Any, bucket: Tensor, *, parameters: Any) -> list[list[Tensor]]:
    """Return the slices of a bucket by the rank in whose partition they belong.

    Args:
        zero: DeepSpeed's optimizer, which cuts each parameter group into one partition a rank.
        bucket: Whole gradients, flat, one after another.
        parameters: DeepSpeed's record of whose they are.

    Returns:
        Views by rank. Neighbours with the same owner are one view; together they are the bucket.
    """
    bounds: list[list[list[int]]] = [[] for _ in range(dist.get_world_size(zero.dp_process_group))]
    begin = 0
    for group, index, parameter in parameters.params:
        starts = {
            rank: zero.grad_start_offset[group][rank][parameter]
            for rank in zero.param_to_partition_ids[group][parameter]
        }
        end = begin + zero.bit16_groups[group][index].numel()
        owners = sorted(starts, key=lambda rank: starts[rank])
        for owner, following in zip(owners, [*owners[1:], None], strict=True):
            first = begin + starts[owner]
            last = end if following is None else begin + starts[following]
            if bounds[owner] and bounds[owner][-1][1] == first:
                bounds[owner][-1][1] = last
            else:
                bounds[owner].append([first, last])
        begin = end
    assert begin == bucket.numel(), "a bucket of other gradients than DeepSpeed's record says"
    return [[bucket[first:last] for first, last in own] for own in bounds]
