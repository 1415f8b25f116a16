"""The parts of `dist-ft search` that train nothing."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dist_ft import cli
from dist_ft.freezing.schedule import LayerOrder
from dist_ft.recipe import load_recipe
from dist_ft.search.blocks import Block, Space, make_space
from dist_ft.search.halving import (
    DIVERGED,
    AllDivergedError,
    Race,
    Score,
    halving_steps,
    make_race,
    plan_rungs,
    rung_steps,
)
from dist_ft.search.run import Blocks, Model
from dist_ft.search.study import BlockCodes, SearchRecord
from dist_ft.search.writing import Findings, write_findings
from tests.helpers.tiny_run import write_recipe

ORDER = LayerOrder(("embeddings",), ("b0", "b1", "b2", "b3"), ("pooler",), ("head.a",))
QUALITY = {Block(0, 4): 0.6, Block(1, 3): 0.9, Block(2, 4): 0.7, Block(4, 4): 0.1}


def test_a_block_trains_itself_the_top_and_the_heads() -> None:
    assert Block(1, 3).trainable(ORDER) == ("b1", "b2", "pooler", "head.a")
    assert Block(0, 1).trainable(ORDER) == ("embeddings", "b0", "pooler", "head.a")
    assert Block(0, 4).trainable(ORDER) == ORDER.everything
    assert Block(4, 4).trainable(ORDER) == ("pooler", "head.a")
    words = [b.describe(4) for b in (Block(1, 3), Block(2, 3), Block(0, 2), Block(0, 4))]
    assert words == ["blocks 1 to 2", "block 2", "embeddings, blocks 0 to 1", "everything"]
    assert Block(4, 4).describe(4) == "heads only"


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys, dist_ft.search.halving, dist_ft.search.blocks;sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_grid_has_every_contiguous_block_once() -> None:
    assert len(make_space([1] * 6, granule=1).grid(1)) == 22
    space = make_space([1] * 7, granule=3)
    assert space.boundaries(3) == [0, 3, 6, 7]
    assert space.grid(3) == [
        Block(0, 3), Block(0, 6), Block(0, 7), Block(3, 6), Block(3, 7), Block(6, 7), Block(7, 7),
    ]  # fmt: skip
    assert make_space([1] * 24, granule=1).granules() == [4, 2, 1]
    assert make_space([1] * 24, granule=2).granules() == [4, 2]
    assert make_space([1] * 6, granule=1).granules() == [1]


def test_neighbours_are_a_granule_away() -> None:
    space = make_space([1] * 7, granule=1)
    near = space.neighbours(Block(4, 7), 2)
    assert near == [Block(2, 6), Block(2, 7), Block(4, 6), Block(6, 7), Block(7, 7)]
    assert space.neighbours(Block(7, 7), 2) == [Block(6, 7)]


def test_the_cost_of_a_step_follows_from_where_the_gradient_goes() -> None:
    space = Space((10, 10, 10, 10))
    assert space.cost(Block(4, 4)) == 1.0  # forward only
    assert space.cost(Block(0, 4)) == 3.0  # forward, two backward
    assert space.cost(Block(2, 4)) == 2.0
    # The gradient passes through the two frozen blocks above.
    assert space.cost(Block(1, 2)) == 1.0 + (30 + 10) / 40


def test_rungs_double_and_keep_to_the_budget() -> None:
    assert rung_steps(4, total_steps=100) == (13, 25, 50, 100)
    rungs = plan_rungs(22, total_steps=720, budget=0.35, shortest=3)
    assert rungs == (90, 180, 360, 720)
    assert halving_steps(22, rungs) == 22 * 90 + 11 * 90 + 5 * 180 + 2 * 360
    assert plan_rungs(22, total_steps=720, budget=1.0, shortest=3) == (720,)


@pytest.mark.parametrize(
    ("entrants", "steps", "budget", "message"),
    [
        (22, 100, 0.0, "--budget is a share above 0 and at most 1, got 0"),
        (22, 100, 1.5, "got 1.5"),
        (22, 8, 0.35, "raise it to 0.75, or train.max_duration"),
        (2, 1000, 0.35, "raise it to 0.51"),
    ],
)
def test_a_budget_that_cannot_be_kept_names_one_that_can(
    entrants: int, steps: int, budget: float, message: str
) -> None:
    with pytest.raises(ValueError, match=r"--budget") as caught:
        plan_rungs(entrants, total_steps=steps, budget=budget, shortest=3)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "granule", "message"),
    [([1] * 4, 0, "got 0"), ([1] * 4, 5, "got 5"), ([], 1, "no transformer blocks")],
)
def test_a_granule_must_fit(sizes: list[int], granule: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_space(sizes, granule=granule)


def race_of(quality: dict[Block, float], *, dropped: list[Block] | None = None) -> Race:
    return Race(
        space=Space((10, 10, 10, 10)),
        rungs=(2, 4),
        score=lambda block, _: Score(quality[block]),
        drop=lambda block: None if dropped is None else dropped.append(block),
        allowance=1e9,
    )


def test_among_equals_the_loss_decides_and_then_the_cost() -> None:
    losses = {Block(0, 4): 0.2, Block(1, 3): 0.1, Block(2, 4): 0.1, Block(4, 4): 0.3}
    race = race_of(QUALITY)
    race.score = lambda block, _: Score(0.5, losses[block])
    assert race.halve(list(QUALITY)) == Block(2, 4)  # as good as 1 to 2, and cheaper
    assert race.ranking()[1:] == [Block(1, 3), Block(0, 4), Block(4, 4)]


def test_a_diverged_run_never_wins_and_equals_are_decided_by_cost() -> None:
    diverged = race_of(QUALITY | {Block(1, 3): math.nan})
    assert diverged.halve(list(QUALITY)) == Block(2, 4)
    assert race_of(dict.fromkeys(QUALITY, 0.5)).halve(list(QUALITY)) == Block(4, 4)


def test_who_has_diverged_goes_no_further_even_if_nobody_else_is_there() -> None:
    dropped: list[Block] = []
    scored: list[tuple[Block, int]] = []
    late, early, good = Block(1, 3), Block(0, 4), Block(4, 4)

    def score(block: Block, step: int) -> Score:
        scored.append((block, step))
        return DIVERGED if block == early or (block == late and step == 4) else Score(0.5)

    race = race_of(QUALITY, dropped=dropped)
    race.score = score
    assert race.halve([early, good]) == good
    assert race.halve([late]) == good  # who has won so far is not given up
    assert (early, 4) not in scored
    assert dropped == [early, late]
    race = race_of(QUALITY)
    race.score = score
    with pytest.raises(AllDivergedError, match=r"by step 4 .* lower optim\.lr"):
        race.halve([late, early])


def test_newcomers_that_all_diverge_late_do_not_end_a_search() -> None:
    trained: list[tuple[Block, int]] = []
    dropped: list[Block] = []
    coarse = {Block(lo, hi) for lo in range(0, 9, 2) for hi in range(0, 9, 2)}

    def score(block: Block, step: int) -> Score:
        trained.append((block, step))
        if block in coarse:
            return Score(0.6 - 0.01 * abs(block.lo - 2) - 0.01 * abs(block.hi - 6))
        return Score(0.9) if step == 10 else DIVERGED

    race = Race(Space((10,) * 8), (10, 20, 40), score, dropped.append, allowance=1e9)
    assert race.run() == race.best == Block(2, 6)
    newcomers = [b for b, step in trained if step == 20 and b not in coarse]
    assert newcomers
    assert set(newcomers) <= set(dropped)
    assert Block(2, 6) not in dropped
    assert race.ranking()[0] == Block(2, 6)


def test_the_best_so_far_defends_itself_without_being_trained_again() -> None:
    dropped: list[Block] = []
    race = race_of(QUALITY, dropped=dropped)
    assert race.halve([Block(2, 4), Block(4, 4)]) == Block(2, 4)
    assert race.halve([Block(0, 4)]) == Block(2, 4)
    assert race.scores[Block(0, 4)] == {2: Score(0.6)}
    assert race.halve([Block(1, 3)]) == Block(1, 3)
    assert dropped == [Block(4, 4), Block(0, 4), Block(2, 4)]
    assert race.steps == 4 + 2 + 2 + 4


@pytest.mark.parametrize("affordable", [False, True])
def test_a_search_ends_when_the_budget_is_spent(affordable: bool) -> None:
    space = Space((10,) * 12)
    rungs = (4, 8, 16, 32)
    first = halving_steps(22, rungs)
    race = Race(
        space=space,
        rungs=rungs,
        score=lambda block, _: Score(-abs(block.lo - 3) - abs(block.hi - 7.0)),
        drop=lambda _: None,
        allowance=first + (halving_steps(9, rungs) if affordable else 0),
    )
    best = race.run()
    # On the coarse grid 2 and 4 are equally near to 3, as are 6 and 8 to 7.
    assert (best == Block(3, 7)) == affordable
    assert affordable or race.steps == first


class Trainer:
    """Stands for the runs: scores are recorded as a search records them, and it can be killed."""

    def __init__(self, folder: Path, *, killed_after: int | None = None) -> None:
        self.record = SearchRecord(folder, name="s", codes=BlockCodes(8), total_steps=32)
        self.left = killed_after
        self.trained: list[tuple[Block, int]] = []

    def score(self, block: Block, step: int) -> Score:
        known = self.record.score(block, step)
        if known is not None:
            return known
        if self.left is not None:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
        self.trained.append((block, step))
        value = Score(-abs(block.lo - 3) - 0.5 * abs(block.hi - 4), loss=step / (1 + block.lo))
        self.record.record(block, step, score=value, facts={"seconds": 1.0})
        return value

    def race(self) -> Race:
        return make_race(
            Space((10,) * 8),
            total_steps=32,
            budget=0.35,
            shortest=1,
            score=self.score,
            drop=self.record.settle,
        )


@pytest.mark.parametrize("killed_after", [0, 1, 10, 14, 19, 21])
def test_a_search_that_was_killed_goes_on_and_trains_nothing_twice(
    tmp_path: Path, killed_after: int
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = Trainer(tmp_path / "whole")
    expected = whole.race()
    assert expected.run() == Block(3, 4)

    killed = Trainer(tmp_path / "killed", killed_after=killed_after)
    with pytest.raises(KeyboardInterrupt):
        killed.race().run()
    resumed = Trainer(tmp_path / "killed")
    race = resumed.race()
    assert race.run() == Block(3, 4)
    assert killed.trained + resumed.trained == whole.trained
    assert race.scores == expected.scores
    assert race.ranking() == expected.ranking()


@pytest.mark.parametrize("lost", [1, 2, 40, 300])
def test_a_journal_whose_end_was_never_written_goes_on(tmp_path: Path, lost: int) -> None:
    record = SearchRecord(tmp_path, name="s", codes=BlockCodes(4), total_steps=9)
    for block in QUALITY:
        record.record(block, 3, score=Score(0.5, 0.1), facts={})
    journal = tmp_path / "study.journal"
    journal.write_bytes(journal.read_bytes()[:-lost])
    mended = SearchRecord(tmp_path, name="s", codes=BlockCodes(4), total_steps=9)
    assert mended.score(Block(0, 4), 3) == Score(0.5, 0.1)
    assert mended.score(Block(4, 4), 3) is None
    mended.record(Block(4, 4), 3, score=Score(0.7, 0.2), facts={})
    again = SearchRecord(tmp_path, name="s", codes=BlockCodes(4), total_steps=9)
    assert again.score(Block(4, 4), 3) == Score(0.7, 0.2)


def test_a_block_keeps_what_every_policy_has(tmp_path: Path) -> None:
    recipe = load_recipe(
        write_recipe(tmp_path),
        overrides=["freezing.returning=reset", "freezing.frozen_embedding_rows=[[0, 5]]"],
    )
    subject = Blocks(recipe, Model(ORDER, dict.fromkeys(ORDER.everything, 10), total_steps=24))
    freezing = subject.recipe_for(Block(0, 2)).freezing
    assert freezing.policy == "static"
    assert freezing.returning == "reset"
    assert freezing.frozen_embedding_rows == [(0, 5)]


def test_table_plot_and_recipe_are_written(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    race = race_of(QUALITY)
    race.halve(list(QUALITY))
    facts = {b: {"metrics": {"text": {"f1": q}}, "seconds": 1.0} for b, q in QUALITY.items()}
    findings = Findings(
        race=race,
        recipe=recipe,
        chosen=recipe.model_copy(update={"name": "tiny-chosen"}),
        trainable_params={b: 100 * (1 + b.depth) for b in QUALITY},
        total_params=500,
        facts=facts,
    )
    text = write_findings(findings, folder=tmp_path)
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines[0].startswith(
        "place,trains,lo,hi,trainable_params,trainable_share,steps,score,loss"
    )
    assert lines[1].startswith("1,blocks 1 to 2,1,3,300,0.6,4,0.9,0.0")
    assert len(lines) == 5
    assert "| 1 | blocks 1 to 2 | 300 | 60.0 % | 4 | 0.9000 | 0.0000 | 1 |" in text
    # 4 candidates for 2 steps and 2 of them for 2 more, out of 11 for 4 steps.
    assert "cost: 12 steps for 4 of 11 candidates, 27.3 % of the 44 steps" in text
    drawn = ElementTree.fromstring((tmp_path / "plot.svg").read_text())
    assert len(drawn.findall("{*}rect")) == 5
    assert load_recipe(tmp_path / "recipe.yaml") == findings.chosen


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "2"], "--budget is a share above 0 and at most 1, got 2"),
        (["--budget", "0.05"], "--budget: 0.05 of training 11 candidates"),
        (["--granule", "5"], "--granule must be between 1 and the number of transformer blocks"),
        (
            ["tasks.0.problem=regression"],
            "evaluation.decide_by: a search ranks by one score, for each the mean over the tasks, "
            "and task text is decided by mse, which has no bound",
        ),
    ],
)
def test_bad_options_end_with_2_before_anything_is_written(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path)
    assert cli.main(["search", str(recipe), "engine.type=reference", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
