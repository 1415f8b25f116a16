"""What does a phase change cost? MiniLM-shaped BERT, 2 gloo ranks, micro-batches of 32 x 64.

For each ZeRO stage: the time of a rebuilding and of an in-place change, in steps of full training,
and the step time of a phase that was reached by changes against a fresh engine that started in it.
The two engines of that comparison take turns in the same process.

    python benchmarks/phase_change.py [--quick] [--json FILE] [--check]
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository is not on the path
    sys.path[0] = str(Path(__file__).parents[1])
os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1")

import numpy as np
import numpy.typing as npt
import torch
import torch._inductor.compile_fx  # pyright: ignore[reportUnusedImport]
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from transformers import BertConfig, BertModel

from benchmarks.common import Claim, claim, markdown_table, parse_arguments, report, say
from dist_ft.engine.base import EngineOptions, Switch
from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
from dist_ft.engine.ds_config import DeepSpeedOptions
from dist_ft.optim.param_groups import ParamGroup

BLOCKS, ROWS, LENGTH = 6, 32, 64
GROUPS = ("embeddings", *(f"block.{i}" for i in range(BLOCKS)), "head")
TOP = GROUPS[-3:]
COLUMNS = {
    "stage": "ZeRO",
    "step_s": "full step, s",
    "rebuild_s": "rebuild, s",
    "rebuild_steps": "rebuild, steps",
    "in_place_ms": "in place, ms",
    "steady": "step after a change / fresh",
}


class Model(nn.Module):
    """A BERT of MiniLM's shape with random weights and a classifier."""

    def __init__(self) -> None:
        """Build it; the same on every rank."""
        super().__init__()
        torch.manual_seed(0)
        config = BertConfig(
            hidden_size=384, num_hidden_layers=BLOCKS, num_attention_heads=12,
            intermediate_size=1536,
        )  # fmt: skip
        config._attn_implementation = "eager"
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(384, 2)

    def forward(
        self, task: str, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]
    ) -> tuple[Tensor, None]:
        """Return the summed cross-entropy."""
        del task
        hidden = self.bert(**inputs).last_hidden_state[:, 0]
        logits = self.head(hidden).float()
        return nn.functional.cross_entropy(logits, targets["y"], reduction="sum"), None


@dataclass(frozen=True)
class Batch:
    """A micro-batch of random tokens."""

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    index: int
    rows: npt.NDArray[np.int64]
    loss_weight: float = 1.0
    distinct: bool = True
    variants: None = None


def batch(rank: int) -> Batch:
    """Return the micro-batch of a rank."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(30_000, (ROWS, LENGTH), generator=generator)
    targets = {"y": torch.randint(2, (ROWS,), generator=generator)}
    return Batch({"input_ids": ids}, targets, rank, np.arange(ROWS))


def group_of(name: str) -> str:
    """Return the layer group of a parameter."""
    if ".layer." in name:
        return f"block.{name.split('.layer.')[1].split('.', maxsplit=1)[0]}"
    return "head" if name.startswith("head") else "embeddings"


def engine_of(stage: int, switch: Switch) -> DeepSpeedEngine:
    """Return an engine over a fresh model."""
    model = Model()
    members: dict[str, list[str]] = {g: [] for g in GROUPS}
    for name, _ in model.named_parameters():
        members[group_of(name)].append(name)
    groups = [
        ParamGroup(g, g, tuple(names), 0.01, 1e-5, frozenset({"a"})) for g, names in members.items()
    ]
    return DeepSpeedEngine(
        model,
        param_groups=groups,
        options=EngineOptions(),
        deepspeed_options=DeepSpeedOptions(stage, ROWS, 1),
        switch=switch,
    )


def step_s(engine: DeepSpeedEngine, mine: Batch) -> float:
    """Return the wall time of one step in seconds; the ranks start together."""
    dist.barrier()
    began = time.perf_counter()
    engine.train_step(
        0,
        task="a",
        micro_batches=[mine],
        global_count=ROWS * dist.get_world_size(),
        learning_rates=dict.fromkeys(GROUPS, 1e-5),
    )
    return time.perf_counter() - began


def measure(stage: int, repeats: int) -> dict[str, Any]:
    """Return one row of the table."""
    mine = batch(dist.get_rank())
    rebuilt, moved = engine_of(stage, "rebuild"), engine_of(stage, "in_place")
    rebuilt.set_trainable(GROUPS)
    moved.set_trainable(GROUPS)
    step_s(rebuilt, mine)
    full = statistics.median(step_s(rebuilt, mine) for _ in range(repeats))
    rebuilds, switches = [], []
    for _ in range(repeats):
        for groups in (TOP, GROUPS):
            rebuilds.append(rebuilt.set_trainable(groups).switch_s)
            step_s(rebuilt, mine)
            switches.append(moved.set_trainable(groups).switch_s)
            step_s(moved, mine)
    rebuilt.set_trainable(TOP)
    fresh = engine_of(stage, "rebuild")
    fresh.set_trainable(TOP)
    for engine in (fresh, rebuilt):
        step_s(engine, mine)
    pairs = [(step_s(rebuilt, mine), step_s(fresh, mine)) for _ in range(4 * repeats)]
    rebuild_s = statistics.median(rebuilds)
    return {
        "stage": stage,
        "step_s": full,
        "rebuild_s": rebuild_s,
        "rebuild_steps": rebuild_s / full,
        "in_place_ms": 1e3 * statistics.median(switches),
        "steady": statistics.median(after / start for after, start in pairs),
    }


def _rank(rank: int, store: str, repeats: int, out: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    stages = (0, 1, 2, 3) if repeats > 1 else (2,)
    rows = [measure(stage, repeats) for stage in stages]
    if rank == 0:
        torch.save(rows, out)
    dist.barrier()
    dist.destroy_process_group()


def claims_of(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Return what must hold."""
    partitioned = [r for r in rows if r["stage"] < 3]
    return [
        claim(
            "rebuild under ZeRO 0-2, in full steps",
            value=max(r["rebuild_steps"] for r in partitioned),
            bound=3.0,
            direction="at most",
        ),
        claim(
            "in-place change, ms",
            value=max(r["in_place_ms"] for r in rows),
            bound=10.0,
            direction="at most",
        ),
        claim(
            "step after a change / step of a fresh engine",
            value=max(r["steady"] for r in rows),
            bound=1.05,
            direction="at most",
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    options = parse_arguments(__doc__ or "", arguments)
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "rows.pt")
        store = str(Path(folder) / "store")
        start_processes(
            _rank, args=(store, 1 if options.quick else 5, out), nprocs=2, start_method="fork"
        )
        rows = torch.load(out, weights_only=True)
    say(markdown_table(rows, columns=COLUMNS))
    packages = ("torch", "deepspeed", "transformers", "dist-ft")
    return report(rows, claims=claims_of(rows), packages=packages, options=options)


if __name__ == "__main__":
    sys.exit(main())
