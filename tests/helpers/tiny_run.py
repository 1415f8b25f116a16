"""A whole run that takes seconds: tiny model folder, raw files, recipe, forked ranks."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import BertConfig, BertModel

from dist_ft.recipe import load_recipe
from dist_ft.train import build
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny_tokenizers import wordpiece

WORDS = ("ada", "wrote", "the", "program", "in", "a", "did", "who", "it", "love")


def write_model(folder: Path, *, layers: int = 4) -> Path:
    """Save a tiny random BERT with its tokenizer as a model folder."""
    tokenizer = wordpiece()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_data(folder: Path, *, rows: int = 60) -> None:
    """Write raw files for three tasks: a label for texts, tags for words, spans in contexts."""
    draw = random.Random(7)
    texts, tagged, questions = [], [], []
    for i in range(rows):
        words = [draw.choice(WORDS) for _ in range(draw.randint(3, 12))]
        texts.append({"text": f"{' '.join(words)} {i}", "label": "yes" if "ada" in words else "no"})
        tags = ["B-PER" if w == "ada" else "O" for w in words]
        tagged.append({"tokens": [*words, str(i)], "tags": [*tags, "O"]})
        context = f"{' '.join(words)} {i}"
        answer = draw.choice(words)
        questions.append(
            {
                "id": str(i),
                "question": f"who did {answer}",
                "context": context,
                "answers": {"text": [answer], "answer_start": [context.index(answer)]},
            }
        )
    for name, items in (("texts", texts), ("tagged", tagged), ("questions", questions)):
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (folder / f"{name}.jsonl").write_text(lines)


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Write model, data and a recipe of three tasks and three phases; return the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model")
    write_data(folder)
    recipe: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "output_dir": "runs",
        "data_dir": "data",
        "model": {"path": "model"},
        "tasks": [
            {
                "name": "text",
                "type": "text_classification",
                "data": {"train": "texts.jsonl", "validation": 0.2},
                "max_length": 32,
            },
            {
                "name": "tags",
                "type": "token_classification",
                "data": {"train": "tagged.jsonl", "validation": 0.2},
                "max_length": 32,
            },
            {
                "name": "spans",
                "type": "question_answering",
                "data": {"train": "questions.jsonl", "validation": 0.2},
                "max_length": 32,
                "doc_stride": 8,
            },
        ],
        "freezing": {"policy": "gradual", "phases": 3, "groups_per_phase": 2},
        "optim": {"lr": 1e-3, "head_lr": 5e-3, "schedule": {"type": "linear", "warmup": "3step"}},
        "engine": {"zero_stage": 2},
        "train": {"max_duration": "24step", "global_batch_size": 8, "micro_batch_size": 4},
        "evaluation": {"every": "12step"},
        "checkpoint": {"every": "8step"},
        "logging": {"every": 1},
    }
    for key, value in changes.items():
        recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def write_media_recipe(folder: Path, *, name: str, task: dict[str, Any]) -> Path:
    """Write a recipe of one task on images or audio, of three phases; return its path."""
    recipe = {
        "name": name,
        "output_dir": "runs",
        "data_dir": "data",
        "model": {"path": "model"},
        "tasks": [task],
        "freezing": {"policy": "gradual", "phases": 3},
        "optim": {"lr": 3e-3, "head_lr": 1e-2},
        "engine": {"zero_stage": 3},
        "train": {"max_duration": "30step", "global_batch_size": 8, "micro_batch_size": 4},
        "evaluation": {"every": "30step"},
        "checkpoint": {"every": "10step"},
        "logging": {"every": 10},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def check_unfroze_and_learnt(run: Path) -> None:
    """Check that one more block trained in each phase, and that the run beats the majority."""
    phases = [e["trainable_groups"] for e in events(run) if e["event"] == "phase"]
    assert [len([g for g in groups if g.startswith("block.")]) for groups in phases] == [0, 1, 2]
    [scores] = [e["metrics"] for e in events(run) if e["event"] == "eval"]
    assert scores["accuracy"] > scores["baseline_majority_accuracy"]


def train(
    recipe: Path,
    overrides: Sequence[str] = (),
    *,
    world_size: int = 2,
    resume: bool = False,
    stop_at: int | None = None,
    exit_code: int = 0,
) -> None:
    """Train on forked ranks; at `stop_at`, once that step is logged, the last gets SIGTERM."""
    run_distributed(
        _rank_trains, recipe, tuple(overrides), resume, stop_at, exit_code, world_size=world_size
    )


def train_in_turn(recipe: Path, runs: Sequence[Sequence[str]], *, world_size: int = 2) -> None:
    """Train several runs to their ends on the same forked ranks, each with its own overrides."""
    run_distributed(_rank_trains_in_turn, recipe, tuple(runs), world_size=world_size)


def _rank_trains_in_turn(path: Path, runs: Sequence[Sequence[str]]) -> None:
    build.dist.shut_down = lambda: None  # the ranks stay together; this process ends with them
    for overrides in runs:
        assert build.train(load_recipe(path, overrides=overrides), resume=False) == 0


def _rank_trains(
    path: Path, overrides: Sequence[str], resume: bool, stop_at: int | None, exit_code: int
) -> None:
    recipe = load_recipe(path, overrides=overrides)
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    if stop_at == 0 and last:
        build.make_run = _interrupted(build.make_run)
    elif stop_at is not None and last:
        metrics = recipe.output_dir / recipe.name / "metrics.jsonl"
        threading.Thread(target=terminate_at, args=(metrics, stop_at), daemon=True).start()
    assert build.train(recipe, resume=resume) == exit_code


def _interrupted(make_run: Any) -> Any:
    """Wrap `make_run` so that SIGTERM arrives while the run is being put together."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return make_run(*args, **kwargs)

    return wrapped


def terminate_at(metrics: Path, step: int) -> None:
    """Send this process SIGTERM once the metrics say that `step` is done."""
    while True:
        if metrics.exists() and any(
            e.get("event") == "step" and e.get("step", 0) >= step for e in events(metrics.parent)
        ):
            os.kill(os.getpid(), signal.SIGTERM)
            return
        time.sleep(0.002)


def terminate_after(journal: Path, scores: int) -> None:
    """Send this process SIGTERM once a search's journal holds that many scores."""
    while not journal.exists() or journal.read_text().count('"intermediate_value"') < scores:
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGTERM)


def events(run: Path) -> list[dict[str, Any]]:
    """Return the events of a run, leaving out an unfinished last line."""
    found = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def newest_checkpoint(run: Path) -> Path:
    """Return the folder of the newest checkpoint."""
    return max((run / "checkpoints").glob("step-*"))


def state_hash(run: Path) -> str:
    """Return the sha256 of all tensors of the newest checkpoint, weights and optimizer state."""
    digest = hashlib.sha256()
    for path in sorted(newest_checkpoint(run).glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
