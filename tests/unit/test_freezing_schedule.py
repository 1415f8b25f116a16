"""Schedules: what trains when, as pure functions."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.freezing.schedule import (
    BlockDraw,
    LayerOrder,
    bottom_up,
    equal_steps,
    every_steps,
    gradual,
    make_phases,
    phase_of,
    trainable_fingerprint,
)

ORDER = LayerOrder(
    bottom=("embeddings",),
    blocks=("block.0", "block.1", "block.2", "block.3"),
    top=("final_norm",),
    heads=("head.a", "head.b"),
)
TOP = ("final_norm", "head.a", "head.b")


def test_order_is_read_from_names_and_kinds() -> None:
    found = LayerOrder.of(
        [
            ("unused", "unused"),
            ("embeddings", "embeddings"),
            ("block.0", "block"),
            ("block.1", "block"),
            ("pooler", "pooler"),
            ("head.a", "head"),
        ]
    )
    assert found == LayerOrder(("embeddings",), ("block.0", "block.1"), ("pooler",), ("head.a",))


def test_gradual_unfreezes_from_the_top_and_the_embeddings_last() -> None:
    starts = gradual(ORDER, first=0, groups_per_phase=2, change_steps=[10, 20, 30])
    phases = make_phases(starts, order=ORDER)
    assert [p.start_step for p in phases] == [0, 10, 20]
    assert phases[0].trainable == TOP
    assert phases[1].trainable == ("block.2", "block.3", *TOP)
    assert phases[2].trainable == ORDER.everything


def test_bottom_up_freezes_from_the_bottom() -> None:
    starts = bottom_up(ORDER, groups_per_phase=1, change_steps=[5, 10, 15, 20], max_depth=3)
    phases = make_phases(starts, order=ORDER)
    assert phases[0].trainable == ORDER.everything
    assert [len(p.trainable) for p in phases] == [8, 6, 5, 4]


def test_more_depth_than_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at most the number of blocks \(4\), got 5"):
        ORDER.above(5)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([(0, ())], "trains nothing"),
        ([(0, ("block.0",))], "trains no head"),
        ([(0, TOP), (5, ORDER.everything), (5, TOP)], "put the phases in order"),
        ([(3, TOP)], "phases begin at step 0"),
    ],
)
def test_impossible_phases_are_refused(starts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_phases(starts, order=ORDER)


def test_a_pattern_that_names_nothing_lists_the_groups() -> None:
    with pytest.raises(ValueError, match=r"'blok.\*' names no layer group; the groups are embed"):
        ORDER.match(["blok.*"], where="freezing.frozen")
    assert ORDER.match(["block.[12]", "head.*"], where="x") == (
        "block.1",
        "block.2",
        "head.a",
        "head.b",
    )


@given(
    st.integers(1, 5), st.integers(0, 200), st.sampled_from(["random", "ascending", "descending"])
)
def test_draws_have_the_asked_size_and_repeat_exactly(blocks: int, period: int, kind: str) -> None:
    draw = BlockDraw(ORDER, blocks, 3, kind, TOP, seed=5)
    trainable = draw.trainable(period)
    assert len(trainable) == min(blocks, 4) + len(TOP)
    assert trainable == draw.trainable(period)
    assert list(trainable) == [n for n in ORDER.everything if n in trainable]


def test_draws_are_frozen_by_golden_values() -> None:
    draw = BlockDraw(ORDER, 1, 3, "random", (), seed=5)
    assert [draw.trainable(p)[0] for p in range(6)] == [
        "block.0",
        "block.1",
        "block.3",
        "block.3",
        "block.0",
        "block.1",
    ]


def test_cyclic_draws_take_every_block_in_turn() -> None:
    draw = BlockDraw(ORDER, 1, 3, "descending", (), seed=0)
    assert [draw.trainable(p)[0] for p in range(4)] == list(ORDER.blocks[::-1])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 300))
def test_a_step_belongs_to_the_last_phase_that_began(gaps: list[int], step: int) -> None:
    steps = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    starts: list[tuple[int, tuple[str, ...]]] = [(0, TOP)]
    for i, start in enumerate(steps):
        starts.append((start, ORDER.everything if i % 2 == 0 else TOP))
    phases = make_phases(starts, order=ORDER)
    phase = phase_of(phases, step)
    assert phase.start_step <= step
    later = [p for p in phases if p.start_step > phase.start_step]
    assert all(step < p.start_step for p in later)


def test_intervals() -> None:
    assert equal_steps(4, total_steps=100) == [25, 50, 75]
    assert every_steps(40, total_steps=100) == [40, 80]


@given(st.permutations(ORDER.everything))
def test_the_fingerprint_is_of_the_set(names: list[str]) -> None:
    assert trainable_fingerprint(names) == trainable_fingerprint(ORDER.everything)
    assert trainable_fingerprint(names[1:]) != trainable_fingerprint(names)
