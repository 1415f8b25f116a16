"""A small run under `dist-ft launch` whose ranks are killed at random times."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from benchmarks.common import ROOT

STEPS, SAVE_EVERY = 160, 10
WORDS = [f"w{i}" for i in range(50)]
_PATIENCE_S = 120.0


@dataclass
class Recovery:
    """One kill, with seconds from it until each sign of life."""

    detect_s: float
    restart_s: float
    reload_s: float
    first_step_s: float
    steps_lost: int


@dataclass
class KilledRun:
    """How a run with kills went.

    Attributes:
        recoveries: One for each kill that was survived.
        kills: How many there were.
        code: Exit code of the launcher.
        seconds: Wall time.
        digest: sha256 of weights, moments and progress at the end.
        stall_s: What training waited for each save.
    """

    recoveries: list[Recovery]
    kills: int
    code: int
    seconds: float
    digest: str
    stall_s: list[float]


def write_recipe(folder: Path) -> Path:
    """Write a model of 0.9 million parameters, 400 rows and a recipe of three phases."""
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=128,
    ).save_pretrained(folder / "model")  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=512, max_position_embeddings=128,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "model")
    draw = random.Random(1)
    rows = ["text,label"]
    for _ in range(400):
        words = draw.choices(WORDS, k=draw.randint(4, 20))
        rows.append(f"{' '.join(words)},{'yes' if 'w1' in words else 'no'}")
    (folder / "train.csv").write_text("\n".join(rows) + "\n")
    recipe = {
        "name": "a",
        "model": {"path": "model"},
        "tasks": [{"name": "t", "type": "text_classification", "data": {"train": "train.csv"}}],
        "freezing": {"policy": "gradual", "phases": 3, "groups_per_phase": 2},
        "train": {"max_duration": f"{STEPS}step", "global_batch_size": 16, "micro_batch_size": 8},
        "checkpoint": {"every": f"{SAVE_EVERY}step"},
        "logging": {"every": 1},
        "supervision": {"timeout_s": 10},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run(recipe: Path, *, name: str, kills: int, seed: int) -> KilledRun:
    """Train on two ranks; SIGKILL a random one `kills` times, at random times."""
    folder = recipe.parent / "runs" / name
    draw = random.Random(seed)
    command = ["launch", "--nproc", "2", "--max-restarts", str(kills + 2), "train", str(recipe)]
    began = time.monotonic()
    launcher = subprocess.Popen(
        [sys.executable, "-m", "dist_ft", *command, f"name={name}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=(recipe.parent / f"{name}.log").open("w"),
    )
    try:
        recoveries = list(_kill(launcher, folder, draw=draw, kills=kills))
        code = launcher.wait(timeout=_PATIENCE_S)
    finally:
        launcher.kill()
    if code:
        raise RuntimeError((recipe.parent / f"{name}.log").read_text()[-2000:])
    seconds = time.monotonic() - began
    stalls = [e["stall_s"] for e in _events(folder) if e["event"] == "checkpoint"]
    return KilledRun(recoveries, kills, code, seconds, digest(folder), stalls)


def _kill(
    launcher: subprocess.Popen[bytes], folder: Path, *, draw: random.Random, kills: int
) -> Iterator[Recovery]:
    process = psutil.Process(launcher.pid)
    log = folder / "logs/supervisor.log"
    for number in range(kills):
        _await(lambda: len(process.children()) == 2, launcher)
        # From while they start and resume until well into the steps.
        time.sleep(draw.uniform(0.05, 1.2))
        ranks = process.children()
        if len(ranks) != 2 or launcher.poll() is not None:
            return
        seen = len(_lines(log))
        events = len(_events(folder))
        reached = _last_step(folder)
        started = time.monotonic()
        os.kill(draw.choice(ranks).pid, signal.SIGKILL)
        _await(lambda seen=seen: len(_lines(log)) > seen, launcher)
        detected = time.monotonic()
        old = {rank.pid for rank in ranks}
        _await(
            lambda old=old: len([c for c in process.children() if c.pid not in old]) == 2, launcher
        )
        restarted = time.monotonic()
        if number == kills - 1 or draw.random() < 0.6:
            _await(lambda n=events: _seen(folder, "resume", after=n), launcher)
            reloaded = time.monotonic()
            _await(lambda n=events: _seen(folder, "step", after=n), launcher)
            stepped = time.monotonic()
            resumed = [e["step"] for e in _events(folder)[events:] if e["event"] == "resume"][-1]
            yield Recovery(
                detected - started, restarted - started, reloaded - started, stepped - started,
                reached - resumed,
            )  # fmt: skip
        # Otherwise the next kill may come while the ranks still start or resume.


def _new(launcher: psutil.Process, old: set[int]) -> list[psutil.Process]:
    return [child for child in launcher.children() if child.pid not in old]


def _await(condition: Any, launcher: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > deadline or launcher.poll() is not None:
            raise RuntimeError(f"the run did not come back (exit code {launcher.poll()})")
        time.sleep(0.005)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _events(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for line in _lines(folder / "metrics.jsonl"):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _seen(folder: Path, event: str, *, after: int) -> bool:
    found = _events(folder)[after:]
    resumes = [i for i, e in enumerate(found) if e["event"] == "resume"]
    return bool(resumes) and any(e["event"] == event for e in found[resumes[-1] :])


def _last_step(folder: Path) -> int:
    return max((e["step"] for e in _events(folder) if e["event"] == "step"), default=0)


def digest(folder: Path) -> str:
    """Return the sha256 of the newest checkpoint's tensors, progress and place in the data."""
    newest = max((folder / "checkpoints").glob("step-*"))
    body = hashlib.sha256()
    for path in sorted(newest.glob("*.safetensors")):
        body.update(path.read_bytes())
    trainer = json.loads((newest / "trainer.json").read_text())
    kept = {name: trainer[name] for name in ("progress", "data", "steps")}
    body.update(json.dumps(kept, sort_keys=True).encode())
    return body.hexdigest()
