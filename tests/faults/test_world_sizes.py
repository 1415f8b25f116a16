"""A run that goes on with other numbers of ranks sees the same rows and ends the same."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
from dist_ft.recipe import load_recipe
from dist_ft.train import build
from dist_ft.train.checkpoint import CheckpointReader
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny_run import events, newest_checkpoint, write_recipe

# Ranks, ZeRO stage and last step of each link. All of them end inside of a phase and of an epoch.
Chain = list[tuple[int, int, int]]
CHAINS: dict[str, Chain] = {
    **{f"stage{s}": [(2, s, 3), (1, s, 6), (3, s, 9), (2, s, 12)] for s in (1, 2, 3)},
    "stages": [(4, 2, 3), (2, 3, 6), (1, 1, 9), (3, 3, 12)],
}


def _until(recipe: Path, overrides: tuple[str, ...], last: int) -> None:
    """Train until step `last`, as if SIGTERM had come then, noting the rows of every step."""
    original = DeepSpeedEngine.train_step
    notes = recipe.parent / f"rows-{overrides[0]}-{os.environ['RANK']}.jsonl"
    make_run = build.make_run
    made: list[Any] = []

    def remembered(*args: Any, **kwargs: Any) -> Any:
        made.append(make_run(*args, **kwargs))
        return made[-1]

    def train_step(self: DeepSpeedEngine, step: int, **kwargs: Any) -> Any:
        rows = [r for b in kwargs["micro_batches"] if b.loss_weight for r in b.rows.tolist()]
        with notes.open("a") as file:
            file.write(json.dumps([step, kwargs["task"], rows]) + "\n")
        result = original(self, step, **kwargs)
        if step + 1 == last < 12:
            made[0].stop_signal = lambda: 15
        return result

    build.make_run = remembered
    DeepSpeedEngine.train_step = train_step
    code = build.train(load_recipe(recipe, overrides=overrides), resume=True)
    assert code == (0 if last == 12 else 75)


def _rows(folder: Path, name: str) -> dict[int, tuple[str, list[int]]]:
    found: dict[int, tuple[str, list[int]]] = {}
    for path in folder.glob(f"rows-name={name}-*.jsonl"):
        for line in path.read_text().splitlines():
            step, task, rows = json.loads(line)
            found[step] = (task, sorted(found.get(step, (task, []))[1] + rows))
    return found


def _weights(run: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(newest_checkpoint(run))
    names = {name for kind, name in reader.saved() if kind == "weight"}
    found: dict[str, torch.Tensor] = {}
    for name in names:
        weight = reader.read("weight", name, start=0, length=reader.numel(name))
        assert weight is not None
        found[name] = weight
    return found


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recipe whose run `oracle` was never interrupted."""
    recipe = write_recipe(
        tmp_path_factory.mktemp("worlds"),
        train={"max_duration": "12step", "global_batch_size": 12, "micro_batch_size": 1},
        mixture={"policy": "temperature", "temperature": 2.0},
        # Softmax does not see what is added to all its inputs, so the true gradient of some biases
        # is zero. Of what rounding leaves of it Adam makes steps of full size, unless its epsilon
        # is far above: then every parameter can be compared.
        optim={"eps": 1e-5},
        evaluation={"every": None},
    )
    run_distributed(_until, recipe, ("name=oracle",), 12)
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_other_numbers_of_ranks_and_stages_see_the_same_rows_and_end_the_same(
    name: str, oracle: Path
) -> None:
    folder = oracle.parent
    for ranks, stage, last in CHAINS[name]:
        overrides = (f"name={name}", f"engine.zero_stage={stage}")
        run_distributed(_until, oracle, overrides, last, world_size=ranks)
    expected = _rows(folder, "oracle")
    assert sorted(expected) == list(range(12))
    assert all(len(rows) == 12 for _, rows in expected.values())
    assert len({task for task, _ in expected.values()}) == 3
    assert _rows(folder, name) == expected
    phases = [e["step"] for e in events(folder / "runs" / name) if e["event"] == "phase"]
    assert phases == [0, 4, 8]  # none of them where a link ends
    one, other = (_weights(folder / "runs" / run) for run in ("oracle", name))
    assert one.keys() == other.keys()
    # The number of ranks changes the order of sums, nothing else.
    assert max(float((one[n] - other[n]).abs().max()) for n in one) <= 1e-5
