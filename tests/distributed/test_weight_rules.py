"""Mixout, averages and penalties of weights under ZeRO 0-3, in fp32 and bf16."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor, nn

from dist_ft.engine.base import EngineOptions, EngineState
from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
from dist_ft.engine.ds_config import DeepSpeedOptions
from dist_ft.engine.ds_state import OwnerLayout
from dist_ft.engine.layout import Piece
from dist_ft.engine.mixing import MixedGroup, Mixing
from dist_ft.engine.reference import ReferenceEngine
from dist_ft.optim.averaging import Averaging
from dist_ft.optim.mixout import kept_elements, mix, mixout_key
from dist_ft.optim.param_groups import LearningRates, ParamGroup, build_param_groups
from dist_ft.optim.penalties import PenaltyRules
from dist_ft.train.retention import Retention
from dist_ft.train.saving import CheckpointWriter, save_checkpoint
from tests.helpers.drawn import drawn
from tests.helpers.phases import ALL, bitwise_equal, clone, largest_difference, mean_difference, run
from tests.helpers.plain import PlainRules, PlainRun, mask
from tests.helpers.run_distributed import run_distributed
from tests.helpers.supervised import before
from tests.helpers.tiny import TinyModel, global_batch, layer_groups, learning_rates

STEPS = 20
HEADS = ("head.a", "head.b")
SCHEDULE = {0: ("block.3", *HEADS), 6: ALL, 12: ("block.1", "block.3", "head.a"), 16: ALL}
BOTH = PlainRules(
    l1=2e-2, l2=3e-2, l2_sp=0.2, l2_sp_new=5e-2, mixout=0.3, ema=0.8, clip=0.5, seed=5
)


def _groups(rules: PlainRules) -> list[ParamGroup]:
    model = TinyModel()
    return build_param_groups(
        layer_groups(model),
        dimensions={n: p.dim() for n, p in model.named_parameters()},
        rates=LearningRates(lr=1e-2, head_lr=2e-2, layer_decay=0.9),
        weight_decay=0.1,
        penalties=PenaltyRules(
            l1=rules.l1,
            l2=rules.l2,
            l2_sp=rules.l2_sp,
            l2_sp_new=rules.l2_sp_new,
            mixout=rules.mixout,
            new=frozenset({"block.2"}),
        ),
    )


def _options(rules: PlainRules) -> EngineOptions:
    averaging = None
    if rules.ema is not None:
        averaging = Averaging("ema", decay=rules.ema)
    elif rules.swa is not None:
        averaging = Averaging("swa", start=rules.swa[0], every=rules.swa[1])
    return EngineOptions(
        precision="bf16" if rules.dtype == torch.bfloat16 else "fp32",
        max_grad_norm=rules.clip,
        seed=rules.seed,
        averaging=averaging,
    )


def _engine(rules: PlainRules, *, stage: int | None, switch: Any = "rebuild") -> Any:
    """Return an engine; the one that switches in place keeps masters and moments on the host."""
    groups = _groups(rules)
    if stage is None:
        return ReferenceEngine(TinyModel(), param_groups=groups, options=_options(rules))
    return DeepSpeedEngine(
        TinyModel(),
        param_groups=groups,
        options=_options(rules),
        deepspeed_options=DeepSpeedOptions(
            zero_stage=stage,
            micro_batch_size=4,
            gradient_accumulation_steps=2,
            offload_optimizer=switch == "in_place",
        ),
        switch=switch,
    )


def _averages(engine: Any) -> dict[str, Tensor]:
    with engine.averaged():
        return engine.full_weights()


@dataclass
class Case:
    """Rules, and what plain torch makes of them."""

    rules: PlainRules
    weights: dict[str, Tensor]
    averages: dict[str, Tensor]

    @classmethod
    def of(cls, rules: PlainRules) -> Case:
        plain = PlainRun(_groups(rules), rules).train(SCHEDULE, steps=STEPS)
        # Where nothing trained, or nothing is averaged, the weights stand for themselves.
        return cls(rules, plain.weights, {**plain.weights, **plain.averages})


def _check(engine: Any, case: Case, *, share: tuple[int, int], bound: float) -> None:
    run(engine, SCHEDULE, steps=range(STEPS), micro_batches=4, share=share)
    before = engine.full_weights()
    averages, after = _averages(engine), engine.full_weights()
    if share[0] == 0:
        assert bitwise_equal(before, after)  # evaluation leaves no trace
        assert largest_difference(before, case.weights) <= bound, case.rules
        assert largest_difference(averages, case.averages) <= bound, case.rules


def _ranks_follow(cases: list[tuple[Case, int, str]]) -> None:
    for case, stage, switch in cases:
        engine = _engine(case.rules, stage=stage, switch=switch)
        _check(engine, case, share=(dist.get_rank(), dist.get_world_size()), bound=1e-5)
        if case.rules == BOTH:
            _check_anchors(engine.set_trainable(ALL).anchor_bytes, stage)


def _check_anchors(anchor_bytes: int, stage: int) -> None:
    own = ("heads", "blocks.2")
    pulled = sum(p.numel() for n, p in TinyModel().named_parameters() if not n.startswith(own))
    share = pulled * 4 / (dist.get_world_size() if stage else 1)
    padding = 4 * 4 * 2 * len(ALL)  # a few elements per parameter group
    assert share <= anchor_bytes <= share + padding, stage


@st.composite
def _rules(draw: Any) -> PlainRules:
    average = draw(st.sampled_from(("none", "ema", "swa")))
    return PlainRules(
        l1=draw(st.sampled_from((0.0, 2e-2))),
        l2=draw(st.sampled_from((0.0, 3e-2))),
        l2_sp=draw(st.sampled_from((0.0, 0.2))),
        mixout=draw(st.sampled_from((0.0, 0.1, 0.5, 0.9))),
        ema=0.9 if average == "ema" else None,
        swa=(draw(st.integers(0, 8)), draw(st.integers(1, 5))) if average == "swa" else None,
        clip=draw(st.sampled_from((0.0, 0.3))),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


def _parts(rules: PlainRules) -> int:
    parts = (rules.l1, rules.l2, rules.l2_sp, rules.mixout, rules.ema, rules.swa, rules.clip)
    return sum(bool(part) for part in parts)


def test_weights_and_averages_equal_plain_torch() -> None:
    case = Case.of(BOTH)
    _check(_engine(BOTH, stage=None), case, share=(0, 1), bound=1e-5)
    without = Case.of(replace(BOTH, mixout=0.0, ema=None))
    assert largest_difference(case.weights, without.weights) > 1e-2
    assert largest_difference(case.weights, case.averages) > 1e-3
    ways = ("rebuild", "rebuild", "in_place", "rebuild")
    swa = Case.of(replace(BOTH, ema=None, swa=(3, 2)))
    assert largest_difference(swa.weights, swa.averages) > 1e-3
    cases = [(one, stage, ways[stage]) for one in (case, swa) for stage in range(4)]
    # Hypothesis begins with the simplest example, in which nothing would be combined.
    combinations = drawn(_rules().filter(lambda r: _parts(r) >= 3), count=4)
    assert {"swa", "ema", "l2_sp", "mixout"} <= {
        n for r in combinations for n in vars(r) if getattr(r, n)
    }
    for i, rules in enumerate(combinations):
        cases.append((Case.of(rules), i, ways[3 - i]))
    run_distributed(_ranks_follow, cases)


def _bf16_follows(case: Case, plain: dict[str, Tensor]) -> None:
    for stage in range(4):
        engine = _engine(case.rules, stage=stage)
        share = (dist.get_rank(), dist.get_world_size())
        run(engine, SCHEDULE, steps=range(STEPS), micro_batches=4, share=share)
        weights = engine.full_weights()
        if dist.get_rank() == 0:
            # Gradients are rounded to bf16 in another order of addition; Adam's first steps turn
            # the sign of a gradient that is nearly zero into a whole step of 1e-2.
            error = mean_difference(weights, case.weights)
            assert error < 2e-3, (stage, error)
            assert mean_difference(weights, plain) > 10 * error


def test_bf16_penalties_and_mixout_follow_plain_torch() -> None:
    rules = replace(BOTH, dtype=torch.bfloat16)
    plain = Case.of(PlainRules(dtype=torch.bfloat16, clip=rules.clip))
    run_distributed(_bf16_follows, Case.of(rules), plain.weights)


def _a_refused_step(rules: PlainRules) -> None:
    for stage in range(4):
        engine = _engine(rules, stage=stage)
        share = (dist.get_rank(), dist.get_world_size())
        run(engine, {0: ALL}, steps=range(2), micro_batches=4, share=share)
        before, averages = clone(engine.full_weights()), clone(_averages(engine))
        batches = global_batch(2, micro_batches=4)
        batches[1].targets["y"].fill_(math.nan)
        result = engine.train_step(
            2,
            task="a",
            micro_batches=batches[share[0] :: share[1]],
            global_count=16,
            learning_rates=learning_rates(_groups(rules), 2),
        )
        assert result.refused
        assert bitwise_equal(engine.full_weights(), before), stage
        assert bitwise_equal(_averages(engine), averages), stage


def test_a_refused_step_leaves_the_true_weights() -> None:
    run_distributed(_a_refused_step, BOTH)


def _saves_beside_changes(root: Path, stages: list[int | None]) -> None:
    """Let the copy of a save wait for other weights than those that the save is of."""
    changed, copied = threading.Event(), threading.Event()
    copy_from = CheckpointWriter._copy_from

    def copy_late(self: CheckpointWriter, state: EngineState) -> None:
        changed.wait(0.1)  # an engine that asks first does not change them until then
        copy_from(self, state)
        copied.set()

    def other_weights(_call: int = 0) -> None:
        changed.set()
        assert copied.wait(5)

    share = (dist.get_rank(), dist.get_world_size())
    for stage in stages:
        engine = _engine(BOTH, stage=stage)
        run(engine, {0: ALL}, steps=range(2), micro_batches=4, share=share)
        for step in (2, 3):
            there = save_checkpoint(root / f"alone-{stage}", step=step, state=engine.state(),
                                    trainer={}).path  # fmt: skip
            writer = CheckpointWriter(root / f"beside-{stage}", retention=Retention())
            engine.before_change = writer.copied
            changed.clear()
            copied.clear()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(CheckpointWriter, "_copy_from", copy_late)
                writer.begin(step=step, state=engine.state(), trainer={})
                if step == 2:  # forwards use mixed weights
                    patch.setattr(engine, "_run", engine._run)
                    before(engine, "_run", other_weights)
                    run(engine, {}, steps=range(2, 3), micro_batches=4, share=share)
                else:
                    with engine.averaged():
                        other_weights()
            saved = writer.wait()
            assert saved is not None
            assert saved.problem is None
            file = f"rank-{share[0]:05d}.safetensors"
            assert (saved.path / file).read_bytes() == (there / file).read_bytes(), (stage, step)


def test_a_save_is_of_its_step_while_mixout_or_averages_take_the_weights_place(
    tmp_path: Path,
) -> None:
    run_distributed(_saves_beside_changes, tmp_path, [0, 1, 2, 3])
    run_distributed(_saves_beside_changes, tmp_path, [None], world_size=1)


def test_mixout_gives_the_true_weights_back_also_after_an_error() -> None:
    weight = nn.Parameter(torch.ones(64))
    share, start = weight.data, torch.zeros(64)
    group = ParamGroup("g", "block.0", ("w",), 0.0, 1e-3, frozenset({"a"}), mixout=0.5)
    layout = OwnerLayout(64, (Piece("w", 0, 64, 0),))
    mixing = Mixing(seed=3)
    mixed = MixedGroup(group, [share], [start], [layout])

    def break_off() -> None:
        with mixing.ending():
            mixing.begin(0, groups=[mixed], parameters={"w": weight})
            assert not torch.equal(share, torch.ones(64))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        break_off()
    assert torch.equal(share, torch.ones(64))
    weight.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones(64)), "a hook was left"


def test_mixout_draws_are_uniform_and_of_their_own() -> None:
    draws = {
        (step, name): mask(3, step, name, 20_000, 0.3) for step in (0, 1) for name in ("v", "w")
    }
    for (step, name), replaced in draws.items():
        key = mixout_key(3, step=step, parameter=name)
        device = torch.device("cpu")
        part = kept_elements(key, start=777, length=999, probability=0.3, device=device)
        assert torch.equal(~part, torch.from_numpy(replaced[777:1776]))
        # Standard deviation of the mean 0.0032: five of them.
        assert abs(replaced.mean() - 0.3) < 0.0165
        for other, also in draws.items():
            if other != (step, name):
                assert abs((replaced & also).mean() - 0.09) < 0.011


def test_mixout_has_the_weight_as_its_mean() -> None:
    weight, start = torch.randn(50), torch.randn(50)
    total = torch.zeros(50, dtype=torch.float64)
    for step in range(4000):
        mixed = weight.clone()
        kept = kept_elements(
            mixout_key(0, step=step, parameter="w"),
            start=0,
            length=50,
            probability=0.5,
            device=torch.device("cpu"),
        )
        mix(mixed, start, kept=kept, probability=0.5)
        total += mixed
    # Each draw is off by the distance from the start; five standard deviations of the mean.
    assert ((total / 4000 - weight).abs() <= 5 * (weight - start).abs() / 4000**0.5).all()


@pytest.mark.parametrize(("type_", "counts"), [("ema", [3, 5, 7]), ("swa", [3, 5, 7])])
def test_an_average_counts_from_its_start(type_: Any, counts: list[int]) -> None:
    averaging = Averaging(type_, start=1, every=2)
    assert [done for done in range(1, 9) if averaging.counts(done)] == counts
