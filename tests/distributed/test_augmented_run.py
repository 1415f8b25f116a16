"""A real run of augmented tasks in an unequal mixture: same rows on any ranks, exact resume."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_ft.data.loader import MicroBatch
from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
from dist_ft.model.backbone import load_tokenizer
from dist_ft.recipe import load_recipe
from dist_ft.train.data import prepare_tasks
from dist_ft.train.loading import make_loader, plan_steps
from dist_ft.train.parts import model_source
from tests.helpers.tiny_run import events, state_hash, train, write_recipe

STEPS = 12
ROWS = 8  # of a step
AUGMENTATION: dict[str, list[dict[str, Any]]] = {
    "text": [
        {"type": "character_noise", "share": 0.5},
        {"type": "word_dropout", "share": 0.3, "probability": 0.7},
    ],
    "tags": [{"type": "mention_replacement"}, {"type": "word_dropout"}],
    "spans": [{"type": "punctuation_insertion"}],
}


def write_augmented(folder: Path) -> Path:
    path = write_recipe(folder)
    recipe = yaml.safe_load(path.read_text())
    recipe["train"] |= {"max_duration": f"{STEPS}step", "micro_batch_size": 2}
    recipe["mixture"] = {"policy": "fixed", "weights": {"text": 2, "tags": 1, "spans": 1}}
    recipe["evaluation"] = recipe["checkpoint"] = {}
    for task in recipe["tasks"]:
        task["augmentation"] = AUGMENTATION[task["name"]]
    path.write_text(yaml.safe_dump(recipe))
    return path


def digests(batch: MicroBatch) -> Mapping[str, str]:
    """Return a hash of all that a row gives to the model and the loss, padding left out."""
    found = {}
    for place, row in enumerate(batch.rows.tolist()):
        mask = batch.inputs["attention_mask"][place] == 1
        digest = hashlib.sha256()
        for name, tensor in sorted({**batch.inputs, **batch.targets}.items()):
            value = tensor[place][mask] if tensor[place].shape == mask.shape else tensor[place]
            digest.update(f"{name} {value.dtype} {value.tolist()}".encode())
        found[str(row)] = digest.hexdigest()
    return found


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the folder where every rank of a run writes what it trains on."""
    whole = DeepSpeedEngine.train_step
    folder = tmp_path / "rows"
    folder.mkdir()

    def recorded(self: Any, step: int, *, task: str, micro_batches: Any, **rest: Any) -> Any:
        rows = [digests(batch) for batch in micro_batches if batch.loss_weight]
        with (folder / f"of-{os.environ['WORLD_SIZE']}").open("a") as file:
            file.write(json.dumps([step, task, rows]) + "\n")
        return whole(self, step, task=task, micro_batches=micro_batches, **rest)

    monkeypatch.setattr(DeepSpeedEngine, "train_step", recorded)
    return folder


def rows_of(path: Path) -> dict[str, str]:
    """Return what was trained on, by step, task and row, over all ranks."""
    found: dict[str, str] = {}
    for step, task, batches in map(json.loads, path.read_text().splitlines()):
        for rows in batches:
            for row, digest in rows.items():
                # A step that is trained again after a resume has the same rows.
                assert found.setdefault(f"{step} {task} {row}", digest) == digest
    return found


def test_augmented_run(tmp_path: Path, record: Path) -> None:
    recipe = write_augmented(tmp_path)
    train(recipe, ["name=straight"])
    trained_on = rows_of(record / "of-2")
    train(recipe, ["name=stopped"], stop_at=4, exit_code=75)
    assert 4 <= events(tmp_path / "runs/stopped")[-1]["step"] < STEPS
    train(recipe, ["name=stopped"], resume=True)
    assert rows_of(record / "of-2") == trained_on
    assert state_hash(tmp_path / "runs/stopped") == state_hash(tmp_path / "runs/straight")

    alone, counted = read(recipe, world_size=1)
    assert trained_on == alone
    assert len(alone) == STEPS * ROWS
    assert [key.split()[1] for key in alone].count("text") == STEPS * ROWS // 2
    assert read(recipe, world_size=4)[0] == alone
    told = {
        e["step"]: e["augmentation"]
        for e in events(tmp_path / "runs/straight")
        if e["event"] == "step"
    }
    assert len(told) == STEPS
    for step, (task, changes) in enumerate(counted, start=1):
        assert set(changes["edits"]) <= {item["type"] for item in AUGMENTATION[task]}
        # Windows of one question may be on two ranks.
        assert task == "spans" or (told[step] == changes and changes["samples"] == ROWS)
    for task in AUGMENTATION:
        assert sum(changes["changed"] for of, changes in counted if of == task) > ROWS // 2


def read(
    recipe: Path, *, world_size: int
) -> tuple[dict[str, str], list[tuple[str, dict[str, Any]]]]:
    """Return what would be trained on, and each step's task with what rank 0 says was changed."""
    loaded = load_recipe(recipe)
    tokenizer = load_tokenizer(model_source(loaded.model))
    tasks = prepare_tasks(loaded, tokenizer=tokenizer, say=lambda _: None)
    mixture = plan_steps(loaded, tasks).mixture
    found: dict[str, str] = {}
    counted: list[tuple[str, dict[str, Any]]] = []
    for rank in range(world_size):
        loader = make_loader(
            loaded, tasks, tokenizer=tokenizer, mixture=mixture, rank=rank, world_size=world_size
        )
        for step in range(STEPS):
            batch = loader.batch(step)
            for micro in batch.micro_batches:
                for row, digest in digests(micro).items():
                    found[f"{step} {batch.task} {row}"] = digest
            if rank == 0:
                assert batch.augmentation is not None
                counted.append((batch.task, batch.augmentation.to_json()))
    return found, counted
