"""Policies that decide from measurements."""

from __future__ import annotations

import json
from typing import Any, Literal

import torch

from dist_ft.freezing.adaptive import PlateauPolicy, SettledPolicy
from dist_ft.freezing.similarity import linear_cka
from tests.unit.test_freezing_schedule import ORDER


def _plateau(direction: Literal["unfreeze", "freeze"] = "unfreeze") -> PlateauPolicy:
    return PlateauPolicy(
        ORDER, direction=direction, first=1, groups_per_phase=2, patience=2, min_delta=0.01
    )


def test_plateau_unfreezes_after_patience_runs_out() -> None:
    policy = _plateau()
    assert policy.phase_at(0).trainable == ORDER.above(3)
    for step, score in ((10, 0.5), (20, 0.505), (30, 0.6), (40, 0.6)):
        policy.observe_score(step, score)
        assert policy.phase_at(step).index == 0
    policy.observe_score(50, 0.605)
    phase = policy.phase_at(51)
    assert (phase.index, phase.start_step, phase.trainable) == (1, 50, ORDER.above(1))


def test_plateau_freezes_in_the_other_direction() -> None:
    policy = _plateau("freeze")
    assert policy.phase_at(0).trainable == ORDER.everything
    for step in (10, 20, 30):
        policy.observe_score(step, 0.5)
    assert policy.phase_at(31).trainable == ORDER.above(2)


def test_a_score_that_is_no_number_is_no_improvement() -> None:
    policy = _plateau()
    for step, score in ((10, float("nan")), (20, 0.5), (30, float("nan"))):
        policy.observe_score(step, score)
    assert (policy.decisions.best, policy.decisions.stalled) == (0.5, 1)


def test_decisions_survive_json() -> None:
    one, other = _plateau(), _plateau()
    for step in (10, 20, 30):
        one.observe_score(step, 0.5)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.phase_at(31) == one.phase_at(31)
    one.observe_score(40, 0.5)
    other.observe_score(40, 0.5)
    assert other.state_dict() == one.state_dict()


def _settled(**changes: Any) -> SettledPolicy:
    options: dict[str, Any] = {"percentile": 50.0, "max_depth": None, "is_rate": False, **changes}
    return SettledPolicy(ORDER, **options)


def test_the_settled_bottom_is_frozen() -> None:
    policy = _settled()
    names = ORDER.blocks
    policy.observe(10, dict.fromkeys(names, 1.0))
    assert policy.phase_at(11).index == 0  # one measurement is no rate
    # Rates 0.01, 0.02, 0.5, 0.9: the median lies between block 1 and block 2.
    policy.observe(20, dict(zip(names, (0.99, 0.98, 0.5, 0.1), strict=True)))
    assert policy.phase_at(21).trainable == ORDER.above(2)


def test_a_moving_bottom_keeps_everything_above_it_training() -> None:
    policy = _settled()
    names = ORDER.blocks
    policy.observe(10, dict.fromkeys(names, 1.0))
    policy.observe(20, dict(zip(names, (0.1, 0.99, 0.99, 0.99), strict=True)))
    assert policy.phase_at(21).index == 0


def test_the_top_block_never_freezes_unless_allowed() -> None:
    policy = _settled(percentile=99.0, is_rate=True)
    for step in range(10, 100, 10):
        active = ORDER.blocks[policy.decisions.depth :]
        policy.observe(step, dict.fromkeys(active, 0.001))
    assert policy.decisions.depth == 3


def test_cka_is_one_for_rotations_and_small_for_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(200, 8, generator=generator)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    assert abs(linear_cka(one, 3.0 * one @ rotation + 1.0) - 1.0) < 1e-5
    assert linear_cka(one, torch.randn(200, 8, generator=generator)) < 0.2
