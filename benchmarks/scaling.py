"""How a step's cost grows: with ranks, sequence length, depth and tasks, and on a cluster.

MiniLM-L6 in bf16 under ZeRO-2, un-padded, on 1, 2 and 4 ranks of one thread with 32 rows each (four
share two cores here, so their cores' efficiency counts cores, not ranks); then one rank on rows of
16 to 128 tokens (as many tokens a step), models of 3 to 12 blocks of the same width with random
weights, and 1 to 8 tasks on one backbone.

The extrapolation is arithmetic, not a measurement: `dist-ft plan`'s model of a step on H100s, eight
to a node. A rank computes at 45 % of the data sheet's peak; a ring sends what ZeRO reduces and
gathers at 75 % of the slowest link (NVLink within a node, 400 Gbit/s a rank between nodes); a
collective waits 10 us for each doubling of the ranks; nothing overlaps. The same arithmetic is held
against what was measured here, with this machine's own all-reduce as the link.
"""

from __future__ import annotations

import functools
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository is not on the path
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.common import (
    Claim,
    Direction,
    claim,
    markdown_table,
    parse_arguments,
    report,
    say,
)
from benchmarks.ranks import on_ranks

# isort: split
import torch
import torch.distributed as dist
from transformers import BertConfig, BertModel

from benchmarks.stepping import Stepper, Stopwatch, around_collectives
from benchmarks.training.own_run import prepare_shards, write_recipe
from benchmarks.training.workload import (
    MICRO_BATCH,
    MODEL,
    Job,
    load_tokenizer,
    write_mixed,
    write_splits,
)
from dist_ft.planning.cost import Cluster, step_time, traffic_of
from dist_ft.planning.hardware import find_hardware
from dist_ft.planning.memory import Setting
from dist_ft.planning.meta import read_shape
from dist_ft.recipe import load_recipe

RANKS = (1, 2, 4)
LENGTHS = (16, 32, 64, 128)
DEPTHS = (3, 6, 12)
TASKS = (1, 2, 4, 8)
TOKENS = 1024
CLUSTERS = (8, 16, 64, 256, 1024)
PER_NODE = 8
GPU = "h100-80g"
# Packaged recipes whose models are extrapolated, and ZeRO stages.
EXTRAPOLATED = (("bert-squad-bottom-up", 2), ("llama-8b-top-half", 3))
PAYLOAD_BYTES = 16 * 2**20
COLUMNS = {
    "kind": "grows",
    "value": "to",
    "step_s": "seconds a step",
    "tokens_per_s": "tokens/s",
    "collectives_s": "in collectives, s",
    "predicted_s": "predicted, s",
    "relative": "of the first",
}
CLUSTER_COLUMNS = {
    "recipe": "recipe",
    "stage": "ZeRO stage",
    "trains": "trains, %",
    "ranks": "ranks",
    "step_ms": "ms a step",
    "sent_mb": "MB sent a rank",
    "efficiency": "compute, % of the step",
}


def measure_rank(recipe: str, folder: str, *, steps: int) -> dict[str, float]:
    """Return rank 0's numbers of a recipe; runs on every rank."""
    stepper = Stepper(Path(recipe), folder=Path(folder), steps=steps)
    stepper.train()
    stepper.seconds()  # DeepSpeed's first step allocates; every task's head once
    watch = Stopwatch()
    with around_collectives(watch):
        times = stepper.seconds()
    tokens = [b.global_tokens for b in stepper.batches]
    return {
        "step_s": statistics.median(times),
        "tokens_per_s": statistics.median(n / t for n, t in zip(tokens, times, strict=True)),
        "collectives_s": watch.seconds / steps,
        "link_bytes_per_s": _link_bytes_per_s(),
    }


def _link_bytes_per_s() -> float:
    """Return what a rank sends in a second of a large all-reduce; infinity for one rank alone."""
    world = dist.get_world_size()
    if world == 1:
        return float("inf")
    payload = torch.zeros(PAYLOAD_BYTES // 2, dtype=torch.bfloat16)
    times: list[float] = []
    for _ in range(3):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(payload)
        times.append(time.perf_counter() - began)
    return 2 * (world - 1) / world * PAYLOAD_BYTES / statistics.median(times)


def run(folder: Path, *, steps: int, ranks: int = 1, **sections: Any) -> dict[str, float]:
    """Return the numbers of a recipe over the rows of a folder."""
    sections.setdefault("train", _train(rows=ranks * MICRO_BATCH, micro=MICRO_BATCH))
    recipe = write_recipe(Job(folder, 0, 100), name="scaling", **sections)
    prepare_shards(recipe)
    call = functools.partial(measure_rank, steps=steps)
    found = on_ranks(call, str(recipe), str(folder / "run"), world_size=ranks)
    return found | {"predicted_s": predicted_collectives_s(recipe, ranks=ranks, found=found)}


def _train(*, rows: int, micro: int) -> dict[str, Any]:
    return {"max_duration": "100ep", "global_batch_size": rows, "micro_batch_size": micro}


def predicted_collectives_s(recipe: Path, *, ranks: int, found: Mapping[str, float]) -> float:
    """Return what the planner's traffic takes on the measured link, seconds."""
    loaded = load_recipe(recipe)
    setting = Setting(ranks, loaded.engine.zero_stage, "bf16", MICRO_BATCH, 1)
    shape = read_shape(loaded, on_gpu=False)
    everything = frozenset(g.name for g in shape.groups)
    traffic = traffic_of(shape, trainable=everything, setting=setting)
    return (traffic.reduced + traffic.gathered) / found["link_bytes_per_s"]


def by_ranks(folder: Path, *, ranks: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """Return a row for each number of ranks: as many rows of data for each rank."""
    write_mixed(folder, rows=1024)
    return _rows("ranks", {n: run(folder, steps=steps, ranks=n) for n in ranks})


def by_length(folder: Path, *, lengths: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """Return a row for each length: as many tokens in a step."""
    # Of the vocabulary as they are: a token each.
    words = sorted(w for w in load_tokenizer().get_vocab() if re.fullmatch("[a-z]{3,}", w))
    found: dict[int, dict[str, float]] = {}
    for length in lengths:
        own = folder / f"length{length}"
        own.mkdir()
        size, inner = TOKENS // length, length - 2  # two tokens frame a row
        # Rows all differ: duplicates would be dropped when the data are prepared.
        rows = [
            {"text": " ".join(words[i * inner : (i + 1) * inner]), "label": str(i % 2)}
            for i in range(2 * size + 2)
        ]
        write_splits(own, train=rows[: 2 * size], validation=rows[2 * size :])
        found[length] = run(own, steps=steps, train=_train(rows=size, micro=size))
    return _rows("tokens of a row", found)


def by_depth(folder: Path, *, depths: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """Return a row for each number of blocks of MiniLM's width."""
    found: dict[int, dict[str, float]] = {}
    for depth in depths:
        path = folder / f"depth{depth}"
        torch.manual_seed(0)
        config = BertConfig(
            num_hidden_layers=depth,
            hidden_size=384,
            intermediate_size=1536,
            num_attention_heads=12,
        )
        BertModel(config).save_pretrained(path)
        load_tokenizer().save_pretrained(path)
        found[depth] = run(folder, steps=steps, model={"path": str(path)})
    return _rows("blocks", found)


def by_tasks(folder: Path, *, counts: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """Return a row for each number of tasks, in turns, on the same rows."""
    files = {s: str(folder / f"{s}.jsonl") for s in ("train", "validation")}
    found: dict[int, dict[str, float]] = {}
    for count in counts:
        tasks = [
            {"name": f"task{i}", "type": "text_classification", "max_length": 128, "data": files}
            for i in range(count)
        ]
        found[count] = run(folder, steps=max(steps, count), model={"path": MODEL}, tasks=tasks)
    return _rows("tasks", found)


def _rows(kind: str, found: Mapping[int, Mapping[str, float]]) -> list[dict[str, Any]]:
    first = next(iter(found.values()))
    return [
        {
            "kind": kind,
            "value": value,
            **numbers,
            # Throughput for ranks, which bring rows of their own; time for what costs.
            "relative": numbers["tokens_per_s"] / first["tokens_per_s"]
            if kind == "ranks"
            else numbers["step_s"] / first["step_s"],
        }
        for value, numbers in found.items()
    ]


def extrapolate(*, clusters: Sequence[int] = CLUSTERS) -> list[dict[str, Any]]:
    """Return the planner's arithmetic of a step on clusters of H100s, each rank's work the same."""
    rows: list[dict[str, Any]] = []
    for name, stage in EXTRAPOLATED:
        recipe = load_recipe(name)
        shape = read_shape(recipe, on_gpu=True)
        blocks = [g.name for g in shape.groups if g.kind == "block"]
        frozen = {"embeddings", *blocks[: len(blocks) // 2]}
        everything = frozenset(g.name for g in shape.groups)
        base = Setting(1, stage, "bf16", recipe.train.micro_batch_size, 1)
        for trainable in (everything, everything - frozen):
            for ranks in clusters:
                setting = replace(base, world_size=ranks)
                cluster = Cluster(find_hardware(GPU), max(1, ranks // PER_NODE), PER_NODE)
                step = step_time(shape, trainable=trainable, setting=setting, cluster=cluster)
                traffic = traffic_of(shape, trainable=trainable, setting=setting)
                rows.append(
                    {
                        "recipe": name,
                        "stage": stage,
                        "trains": 100 * shape.numel_of(trainable) / shape.numel,
                        "ranks": ranks,
                        "step_ms": 1000 * step.total_s,
                        "sent_mb": (traffic.reduced + traffic.gathered) / 1e6,
                        "efficiency": 100 * step.compute_s / step.total_s,
                    }
                )
    return rows


def claims_of(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Return what must hold; what a quick run leaves out does not."""
    by = {(r["kind"], r["value"]): r["relative"] for r in rows}
    wanted: tuple[tuple[str, tuple[str, int], float, Direction], ...] = (
        ("two ranks on two cores, throughput x one", ("ranks", 2), 1.5, "at least"),
        ("rows of 128 tokens, step x rows of 16", ("tokens of a row", 128), 1.25, "at most"),
        ("12 blocks, step x 3 blocks", ("blocks", 12), 4.0, "at most"),
        ("8 tasks, step x one task", ("tasks", 8), 1.1, "at most"),
    )
    return [claim(n, value=by.get(key), bound=b, direction=d) for n, key, b, d in wanted]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    options = parse_arguments(__doc__ or "", arguments)
    steps = 2 if options.quick else 9
    every = 3 if options.quick else 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = by_ranks(folder, ranks=RANKS[:2] if options.quick else RANKS, steps=steps)
        rows += by_length(folder, lengths=LENGTHS[::every], steps=steps)
        rows += by_depth(folder, depths=DEPTHS[:: max(1, every - 1)], steps=steps)
        rows += by_tasks(folder, counts=TASKS[::every], steps=steps)
    cluster = extrapolate()
    say(markdown_table(rows, columns=COLUMNS))
    say()
    say("arithmetic, not measured:")
    say(markdown_table(cluster, columns=CLUSTER_COLUMNS))
    packages = ("torch", "deepspeed", "transformers", "dist-ft")
    return report([*rows, *cluster], claims=claims_of(rows), packages=packages, options=options)


if __name__ == "__main__":
    sys.exit(main())
