"""bf16 in every ZeRO stage: the same steps, masters that were not touched when built."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist

from dist_ft.engine.base import EngineOptions, EngineState, StateSlice
from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
from dist_ft.engine.ds_setup import set_up_deepspeed
from dist_ft.engine.ds_weights import FloatBuffers
from dist_ft.train.checkpoint import CheckpointReader
from dist_ft.train.saving import save_checkpoint
from tests.helpers.phases import ALL, bitwise_equal, make_deepspeed, run
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny import TinyModel, global_batch, learning_rates, param_groups

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


FP16 = EngineOptions(precision="fp16")
SCALING = {"fp16": {"initial_scale_power": 10, "loss_scale_window": 3, "hysteresis": 2}}


def _overflow(engine: DeepSpeedEngine, step: int) -> None:
    """Run a step whose gradients are not finite on one rank; nothing but the scale may move."""
    before = _copied(engine.state())
    batches = global_batch(step, micro_batches=2)
    batches[1].targets["y"].fill_(1e30)
    result = engine.train_step(
        step,
        task="a",
        micro_batches=batches[dist.get_rank() :: 2],
        global_count=8,
        learning_rates=learning_rates(param_groups(TinyModel()), step),
    )
    assert result.grad_norm is None
    after = _copied(engine.state())
    assert after.steps == before.steps
    assert after.loss_scale["last_overflow_iter"] == before.loss_scale["cur_iter"]
    _same_slices(before, after)


def _same_slices(one: EngineState, other: EngineState) -> None:
    values, others = (
        {(s.parameter, s.start, k): v for s in state.slices for k, v in s.values.items()}
        for state in (one, other)
    )
    assert values.keys() == others.keys()
    assert [k for k, v in values.items() if not torch.equal(v, others[k])] == []


def _copied(state: EngineState) -> EngineState:
    slices = [
        StateSlice(s.parameter, s.start, {k: v.clone() for k, v in s.values.items()})
        for s in state.slices
    ]
    return replace(state, slices=slices)


def _say_whether_fp16_runs(answer: bool) -> None:
    """DeepSpeed asks the CPU for instructions that are quick; torch multiplies without them."""
    set_up_deepspeed()
    accelerator: Any = deepspeed.get_accelerator()
    accelerator.is_fp16_supported = lambda: answer


def _loss_scale_survives(folder: Path) -> None:
    _say_whether_fp16_runs(True)
    share = (dist.get_rank(), dist.get_world_size())
    for stage in (1, 2, 3):
        engine = make_deepspeed(FP16, zero_stage=stage, base=SCALING)
        run(engine, {0: ALL}, steps=range(2), micro_batches=2, share=share)
        for step in (2, 3, 4):
            _overflow(engine, step)
        run(engine, {}, steps=range(5, 7), micro_batches=2, share=share)
        before = engine.state().loss_scale
        # The first overflow takes hysteresis only; counters stand in the middle of a window.
        assert before == {
            "cur_scale": 256.0, "cur_iter": 7, "last_overflow_iter": 4, "cur_hysteresis": 1,
        }  # fmt: skip
        assert engine.set_trainable(TOP).switch == "rebuild"
        assert engine.state().loss_scale == before
        state = engine.state()
        saved = save_checkpoint(folder / str(stage), step=7, state=state, trainer={}).path
        run(engine, {}, steps=range(7, 12), micro_batches=2, share=share)
        resumed = make_deepspeed(FP16, zero_stage=stage, base=SCALING)
        resumed.set_trainable(TOP)
        resumed.load_state(CheckpointReader(saved))
        assert resumed.state().loss_scale == before
        run(resumed, {}, steps=range(7, 12), micro_batches=2, share=share)
        assert engine.state().loss_scale["cur_scale"] > 256  # a window ended in between
        assert resumed.state().loss_scale == engine.state().loss_scale
        assert resumed.state().steps == engine.state().steps
        assert bitwise_equal(resumed.full_weights(), engine.full_weights())


def test_the_loss_scale_outlives_phase_changes_and_the_process(tmp_path: Path) -> None:
    run_distributed(_loss_scale_survives, tmp_path)


def _reset_and_parked(folder: Path) -> None:
    share = (dist.get_rank(), dist.get_world_size())
    other = ("block.2", "head.a", "head.b")
    options = EngineOptions(precision="bf16", returning="reset")
    for stage in (2, 3):
        engine = make_deepspeed(options, zero_stage=stage, switch="rebuild")
        run(engine, {0: TOP, 3: other}, steps=range(5), micro_batches=2, share=share)
        engine.set_trainable(TOP)  # it returns and is reset, but has no update
        engine.set_trainable(other)
        state = engine.state()
        assert state.steps["block.3/decay"] == 0
        saved = save_checkpoint(folder / str(stage), step=5, state=state, trainer={}).path
        run(engine, {5: TOP}, steps=range(5, 7), micro_batches=2, share=share)
        resumed = make_deepspeed(options, zero_stage=stage, switch="rebuild")
        resumed.set_trainable(other)
        resumed.load_state(CheckpointReader(saved))
        run(resumed, {5: TOP}, steps=range(5, 7), micro_batches=2, share=share)
        _same_slices(engine.state(), resumed.state())


def test_a_group_that_was_reset_and_parked_comes_back_to_the_bit(tmp_path: Path) -> None:
    run_distributed(_reset_and_parked, tmp_path)


def _refused() -> None:
    _say_whether_fp16_runs(False)
    with pytest.raises(ValueError, match="fp16 does not run on this cpu"):
        make_deepspeed(FP16, zero_stage=2)


def test_fp16_is_refused_where_it_does_not_run() -> None:
    run_distributed(_refused)


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
