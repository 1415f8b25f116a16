"""Our dropout inside a model on real ranks: ZeRO 0 to 3 against one process, by the same masks."""

from __future__ import annotations

from unittest import mock

import torch.distributed as dist
from torch import Tensor

from dist_ft.engine.base import Engine, EngineOptions
from dist_ft.model import dropout_modules
from dist_ft.model.dropout_modules import find_dropouts, use_byte_dropout
from tests.helpers.phases import ALL, largest_difference, make_deepspeed, make_reference, run
from tests.helpers.run_distributed import run_distributed

# A tiny epsilon would turn the rounding of vanishing gradients into steps.
OPTIONS = EngineOptions(seed=3, eps=1e-5, max_grad_norm=1.0)
SCHEDULE = {0: ALL, 3: ALL[2:]}
STEPS, MICRO_BATCHES = range(6), 4


def _weights(engine: Engine, *, share: tuple[int, int] = (0, 1)) -> dict[str, Tensor]:
    with mock.patch.object(dropout_modules, "FEWEST", 0):
        run(engine, SCHEDULE, steps=STEPS, micro_batches=MICRO_BATCHES, share=share)
    found = dict(engine.full_weights())
    engine.close()
    return found


def _compare() -> None:
    share = dist.get_rank(), dist.get_world_size()
    plain = _weights(make_reference(OPTIONS, dropout=0.3))
    reference = make_reference(OPTIONS, dropout=0.3)
    use_byte_dropout(modules := find_dropouts(reference.module))
    assert modules
    expected = _weights(reference)
    assert largest_difference(expected, plain) > 1e-3  # another mask
    for stage in range(4):
        accumulation = MICRO_BATCHES // share[1]
        engine = make_deepspeed(OPTIONS, zero_stage=stage, dropout=0.3, accumulation=accumulation)
        # Also after ZeRO-3 has hooked and divided the modules.
        use_byte_dropout(find_dropouts(engine.module))
        found = _weights(engine, share=share)
        if share[0] == 0:
            assert largest_difference(found, expected) <= 1e-5, stage


def test_it_trains_alike_under_zero_and_in_one_process() -> None:
    run_distributed(_compare)
