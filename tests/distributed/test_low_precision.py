"""bf16 in every ZeRO stage: the same steps, masters that were not touched when built."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_ft.engine.base import EngineOptions
from dist_ft.engine.ds_weights import FloatBuffers
from tests.helpers.phases import ALL, make_deepspeed, run
from tests.helpers.run_distributed import run_distributed

TOP = ("block.3", "head.a", "head.b")


def _masters(stage: int, results: Any) -> None:
    engine = make_deepspeed(EngineOptions(precision="bf16"), zero_stage=stage)
    share = (dist.get_rank(), dist.get_world_size())
    run(engine, {0: TOP, 3: ALL}, steps=range(8), micro_batches=2, share=share)
    state = engine.state()
    masters = {
        (s.parameter, s.start): s.values["master"].clone()
        for s in state.slices
        if "master" in s.values
    }
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, masters)
    if dist.get_rank() == 0:
        results.append((dict(state.steps), {k: v for part in gathered for k, v in part.items()}))


def _all_stages() -> None:
    results: list[Any] = []
    for stage in (0, 1, 2, 3):
        _masters(stage, results)
    if dist.get_rank():
        return
    expected = {"block.0/decay": 5, "block.3/decay": 8, "head.a/decay": 4}
    for steps, masters in results:
        assert {name: steps[name] for name in expected} == expected
        whole = _whole(masters)
        reference = _whole(results[2][1])
        assert whole.keys() == reference.keys()
        for name, value in whole.items():
            # Gradients are rounded to bf16 after other sums in stage 0; a step counted or decayed
            # twice would show as 1e-3 and more already after the first steps.
            assert float((value - reference[name]).abs().mean()) < 2e-3, name


def _whole(masters: dict[tuple[str, int], torch.Tensor]) -> dict[str, torch.Tensor]:
    names = sorted({name for name, _ in masters})
    return {n: torch.cat([masters[key] for key in sorted(masters) if key[0] == n]) for n in names}


def test_every_stage_counts_the_same_steps() -> None:
    run_distributed(_all_stages)


def test_fp16_without_partitions_is_refused() -> None:
    with pytest.raises(ValueError, match="fp16 needs zero_stage 1 or more"):
        make_deepspeed(EngineOptions(precision="fp16"), zero_stage=0)


def test_float_buffers_keep_their_precision() -> None:
    module = torch.nn.Module()
    module.register_buffer("inv_freq", torch.rand(8))
    kept = FloatBuffers(module)
    module.to(torch.bfloat16)
    kept.restore()
    assert module.inv_freq.dtype == torch.float32
