"""How much memory does preparing data take, and is the result the same after kills?

Generates a jsonl file of 2 GB (rows of 2 kB: a text of 300 characters and a column that no task
uses; one text has 2 million characters, one 14 million, which is refused and counted; and there are
duplicates), prepares it by the command line with two encoding processes, watches the memory of each
process, then does so again in another folder where the process is killed at random moments
(SIGKILL) and started again.

    python benchmarks/prepare.py [--quick] [--json FILE] [--check]

Memory is the most that a process ever had resident, libraries and mapped pages included, as Linux
counts it (VmHWM).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import yaml

if not __package__:  # run as a file: the repository is not on the path
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.common import ROOT, Claim, claim, markdown_table, parse_arguments, report, say

GB = 10**9
SPLITS = ("train", "validation")
PACKAGES = ("dist-ft", "torch", "transformers", "tokenizers", "pyarrow")
COLUMNS = {
    "run": "run",
    "seconds": "seconds",
    "mb_per_s": "MB/s of jsonl",
    "peak_gb": "peak GB, the process",
    "peak_worker_gb": "peak GB, an encoding process",
    "shards_before": "shards found",
    "result": "result",
}
_TEXT, _REST = 300, 1650
_SAMPLE_S = 0.05
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass
class Outcome:
    """How a preparation ended.

    Attributes:
        code: Exit code, negative after a signal.
        seconds: Wall time.
        peak: Most bytes resident in the process that was started.
        peak_worker: Most in one of its encoding processes, 0 without any.
    """

    code: int
    seconds: float
    peak: int = 0
    peak_worker: int = 0


def write_source(path: Path, *, size: int) -> int:
    """Write rows until the file has `size` bytes, the same every time; return the rows."""
    draw = random.Random(0)
    book = " ".join(draw.choices(_words(), k=500_000))
    rows = written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            start = draw.randrange(len(book) - _REST)
            # Every twentieth row repeats one text or another.
            text = f"{book[start : start + _TEXT]} {rows if rows % 20 else rows % 400}"
            if rows in (1000, 2000):
                text = book[: 2 * 2**20] if rows == 1000 else book * 4
            rest = book[start : start + _REST]
            row = {"text": text, "label": "yes" if rows % 3 else "no", "rest": rest}
            written += file.write(json.dumps(row) + "\n")
            rows += 1
    return rows


def _words() -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(_LETTERS, k=draw.randint(2, 10))) for _ in range(3000)]


def write_recipe(folder: Path) -> Path:
    """Write a tiny model that knows the words, and the recipe."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    signs = _LETTERS + "0123456789"
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    tokens = dict.fromkeys((*special, *_words(), *signs, *(f"##{sign}" for sign in signs)))
    vocabulary = {token: n for n, token in enumerate(tokens)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    tokenizer.save_pretrained(folder / "model")
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    BertModel(config).save_pretrained(folder / "model")
    recipe = {
        "name": "prepare",
        "data_processes": 2,
        "model": {"path": "model"},
        "tasks": [
            {
                "name": "text",
                "type": "text_classification",
                "data": {"train": "source.jsonl", "validation": 0.1},
                "max_length": 128,
                "on_error": "skip",
            }
        ],
        "train": {"max_duration": "1ep", "global_batch_size": 32, "micro_batch_size": 8},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def prepare(recipe: Path, data_dir: Path, *, kill_after: float | None = None) -> Outcome:
    """Prepare the recipe's data, or kill that after so many seconds; watch the memory.

    Raises:
        RuntimeError: If it ended in any other way than at its end or by the kill.
    """
    began = time.monotonic()
    with (recipe.parent / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dist_ft", "prepare", str(recipe), f"data_dir={data_dir}"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
        )
    outcome = Outcome(0, 0.0)
    while process.poll() is None:
        if kill_after is not None and time.monotonic() - began > kill_after:
            process.kill()
        outcome.peak = max(outcome.peak, peak_bytes(process.pid))
        for worker in children_of(process.pid):
            outcome.peak_worker = max(outcome.peak_worker, peak_bytes(worker))
        time.sleep(_SAMPLE_S)
    outcome.code = process.returncode
    outcome.seconds = time.monotonic() - began
    if outcome.code not in (0, -signal.SIGKILL):
        log_end = (recipe.parent / "log.txt").read_text()[-2000:]
        raise RuntimeError(f"preparing ended with exit code {outcome.code}: {log_end}")
    return outcome


def children_of(pid: int) -> list[int]:
    """Return a process's children and theirs, none if it is gone."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def peak_bytes(pid: int) -> int:
    """Return the most bytes that a process had resident so far, 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def dataset_ids(data_dir: Path) -> dict[str, str]:
    """Return the id of each prepared split."""
    paths = {split: data_dir / "text" / split / "manifest.json" for split in SPLITS}
    return {s: json.loads(p.read_text())["dataset_id"] for s, p in paths.items() if p.is_file()}


@dataclass
class Results:
    """What came out.

    Attributes:
        rows: One for each start of the command.
        peak: Most bytes of any process of any of them.
        ids: The ids of the splits, undisturbed.
        ids_after_kills: The ids where it was killed.
        kills: How many kills hit.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    peak: int = 0
    ids: dict[str, str] = field(default_factory=dict)
    ids_after_kills: dict[str, str] = field(default_factory=dict)
    kills: int = 0

    def add(self, name: str, outcome: Outcome, *, size: int, shards: int) -> None:
        """Note how a start of the command ended."""
        self.peak = max(self.peak, outcome.peak, outcome.peak_worker)
        done = outcome.code == 0
        self.rows.append({
            "run": name,
            "seconds": round(outcome.seconds, 1),
            "mb_per_s": round(size / 1e6 / outcome.seconds, 1) if done and not shards else None,
            "peak_gb": outcome.peak / GB,
            "peak_worker_gb": outcome.peak_worker / GB,
            "shards_before": shards,
            "result": "done" if done else f"exit code {outcome.code}",
        })  # fmt: skip


def run(folder: Path, *, size: int, kills: int) -> Results:
    """Generate, prepare, and prepare with kills."""
    source = folder / "source.jsonl"
    count = write_source(source, size=size)
    size = source.stat().st_size
    say(f"{count:,} rows, {size / GB:.2f} GB of jsonl")
    recipe = write_recipe(folder)
    results = Results()
    straight = prepare(recipe, folder / "straight")
    results.add("undisturbed", straight, size=size, shards=0)
    results.ids = dataset_ids(folder / "straight")
    draw = random.Random(1)
    data_dir = folder / "killed"
    for number in range(kills):
        shards = _count_shards(data_dir)
        left = 1 - shards / _count_shards(folder / "straight")
        # What one run has finished, the next one only finds: at the end that takes little time.
        moment = draw.uniform(0.2, 0.8) * straight.seconds * max(left, 0.1)
        outcome = prepare(recipe, data_dir, kill_after=moment)
        results.kills += outcome.code == -signal.SIGKILL
        results.add(f"to be killed, {number + 1}", outcome, size=size, shards=shards)
    shards = _count_shards(data_dir)
    results.add("to the end", prepare(recipe, data_dir), size=size, shards=shards)
    results.ids_after_kills = dataset_ids(data_dir)
    return results


def _count_shards(data_dir: Path) -> int:
    return len(list(data_dir.glob("text/*/shard-*.arrow"))) if data_dir.exists() else 0


def claims_of(results: Results) -> list[Claim]:
    """Return what the results are to show."""
    same = sum(results.ids_after_kills.get(s) == results.ids[s] for s in SPLITS)
    return [
        claim("peak GB of a process", value=results.peak / GB, bound=1.0, direction="at most"),
        claim("kills that hit", value=results.kills, bound=2, direction="at least"),
        claim("splits with the same id after kills", value=same, bound=2, direction="at least"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    options = parse_arguments(__doc__ or "", arguments)
    with tempfile.TemporaryDirectory() as folder:
        size = 60 * 10**6 if options.quick else 2 * GB
        results = run(Path(folder), size=size, kills=2 if options.quick else 3)
    say(markdown_table(results.rows, columns=COLUMNS))
    for split, found in results.ids.items():
        say(f"{split}: {found}, after kills {results.ids_after_kills.get(split)}")
    claims = claims_of(results)
    return report(results.rows, claims=claims, packages=PACKAGES, options=options)


if __name__ == "__main__":
    sys.exit(main())
