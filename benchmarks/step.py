"""How much of the machine a fine-tuning step uses: tokens/s, MFU, and what eats the rest.

Two gloo ranks of one thread fine-tune MiniLM-L6 (hidden 384) and a BERT-base shape with random
weights (12 blocks, hidden 768) on real rows without padding, in fp32 and bf16 under ZeRO-2, all
layers training. MFU (model FLOP/s utilization; Chowdhery et al. 2022, "PaLM", appendix B) is the
arithmetic of the model's matrix products for useful tokens, 6 for each weight and token and 12 for
each pair of tokens, channel and block, over what the ranks' cores reach in a square GEMM of the
same dtype, measured in the same run. What the head's task does not need is not counted: of the last
block all but keys and values is for the first token of each row. The profile is rank 0's.
"""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

if not __package__:  # run as a file: the repository is not on the path
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.common import Claim, claim, markdown_table, parse_arguments, report, say
from benchmarks.ranks import on_ranks

# isort: split
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import BertConfig, BertModel

from benchmarks.stepping import Stepper, around_collectives, gemm_peak
from benchmarks.training.own_run import prepare_shards, write_recipe
from benchmarks.training.workload import MODEL, RANKS, Job, load_tokenizer, write_mixed
from dist_ft.data.loader import StepBatch
from dist_ft.engine.heap import keep_freed_memory

MINILM, BERT_BASE = "MiniLM-L6, hidden 384", "BERT-base shape, hidden 768"
# Shape, precision, rows of a rank in a step.
SETTINGS = (
    (MINILM, "fp32", 32),
    (MINILM, "bf16", 32),
    (MINILM, "bf16", 128),
    (BERT_BASE, "fp32", 32),
    (BERT_BASE, "fp32", 128),
    (BERT_BASE, "bf16", 32),
    (BERT_BASE, "bf16", 128),
)
QUICK = ((MINILM, "bf16", 32), (BERT_BASE, "fp32", 32), (BERT_BASE, "bf16", 32))
COLUMNS = {
    "shape": "model",
    "precision": "precision",
    "rows": "rows a rank",
    "tokens": "tokens a rank",
    "step_s": "seconds a step",
    "tokens_per_s": "tokens/s",
    "peak_gflops": "GEMM peak, GFLOP/s a rank",
    "mfu": "MFU, %",
}
COMMUNICATION, OPTIMIZER = "communication", "optimizer, clipping"
# Names of a profile's operators by what they are for, the first that fits.
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (COMMUNICATION, ("bench::communication", "c10d::", "gloo:")),
    ("GEMM", ("aten::mm", "aten::addmm", "aten::linear", "aten::matmul")),
    ("attention", ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_scaled_dot")),
    # On a CPU dropout is a drawn mask, divided and multiplied.
    ("dropout", ("aten::bernoulli", "aten::native_dropout", "aten::div_")),
    ("norm, activation", ("aten::native_layer_norm", "aten::gelu", "aten::tanh")),
    ("copies, casts", ("aten::copy_", "aten::_to_copy", "aten::cat", "aten::clone")),
    ("embedding", ("aten::embedding", "aten::index")),
)
OTHER, PYTHON = "other operators", "Python, DeepSpeed, waiting"
PROFILE = {"kind": "share of a step, %"}


def useful_flops(config: Any, lengths: Iterable[int]) -> float:
    """Return the model FLOP of a step's forward and backward over rows of these lengths.

    Matrix products of the blocks for each token, of attention for each pair of a row's tokens, and
    of the pooler for each row; looking up embeddings is none. The last block has keys and values
    for each token, and everything else for each row.
    """
    hidden, inner, blocks = (
        config.hidden_size, config.intermediate_size, config.num_hidden_layers,
    )  # fmt: skip
    sizes = list(lengths)
    tokens, rows, pairs = sum(sizes), len(sizes), sum(n * n for n in sizes)
    block = 4 * hidden**2 + 2 * hidden * inner
    whole = (blocks - 1) * (6.0 * block * tokens + 12.0 * hidden * pairs)
    keys_and_values = 2 * hidden**2
    last = 6.0 * (keys_and_values * tokens + (block - keys_and_values) * rows)
    return whole + last + 12.0 * hidden * tokens + 6.0 * hidden**2 * rows


def kind_of(name: str, *, in_optimizer: bool) -> str:
    """Return what an operator of a profile is for."""
    for kind, prefixes in KINDS:
        if name.startswith(prefixes):
            # What the optimizer multiplies and copies is its own; what it waits for is not.
            return OPTIMIZER if in_optimizer and kind != COMMUNICATION else kind
    return OPTIMIZER if in_optimizer else OTHER


def shares(events: Iterable[tuple[str, bool, float]], *, wall: float) -> dict[str, float]:
    """Return each kind's share of a profiled time.

    Args:
        events: Operator, whether inside of the optimizer's step, time without its children in s.
        wall: The whole time in seconds; what no operator took is Python, DeepSpeed and waiting.
    """
    found: dict[str, float] = {}
    for name, in_optimizer, seconds in events:
        kind = kind_of(name, in_optimizer=in_optimizer)
        found[kind] = found.get(kind, 0.0) + seconds / wall
    found[PYTHON] = max(0.0, 1.0 - sum(found.values()))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def measure_rank(recipe: str, folder: str, *, steps: int, precision: str) -> dict[str, Any]:
    """Return rank 0's numbers of a setting; runs on every rank."""
    keep_freed_memory()  # as `dist-ft train` does
    stepper = Stepper(Path(recipe), folder=Path(folder), steps=steps + 1)
    stepper.train()
    stepper.seconds(stepper.batches[:1])
    peaks = [gemm_peak(precision)]
    batches = stepper.batches[1:]
    times = stepper.seconds(batches)
    peaks.append(gemm_peak(precision))
    kinds = _profile(stepper, batches[: max(1, steps // 2)])
    config = stepper.run.engine.module.model.backbone.config  # pyright: ignore
    lengths = [_lengths(b) for b in batches]
    sums = torch.tensor(
        [
            [useful_flops(config, n) / t, sum(n) / t, sum(n)]
            for n, t in zip(lengths, times, strict=True)
        ],
        dtype=torch.float64,
    )
    peak = torch.tensor(max(peaks), dtype=torch.float64)
    dist.all_reduce(sums)
    dist.all_reduce(peak)
    return {
        "tokens": statistics.median(sums[:, 2].tolist()) / dist.get_world_size(),
        "step_s": statistics.median(times),
        "tokens_per_s": statistics.median(sums[:, 1].tolist()),
        "peak_gflops": float(peak) / dist.get_world_size() / 1e9,
        "mfu": 100 * statistics.median((sums[:, 0] / peak).tolist()),
        "profile": kinds,
    }


def _lengths(batch: StepBatch) -> list[int]:
    """Return the rows' lengths of this rank's part of a step, fillers not counted."""
    own = [b for b in batch.micro_batches if b.loss_weight > 0]
    return [int(n) for b in own for n in b.inputs["attention_mask"].sum(1)]


def _profile(stepper: Stepper, batches: Sequence[StepBatch]) -> dict[str, float]:
    with _marked(stepper.run.engine), profile(activities=[ProfilerActivity.CPU]) as profiled:
        wall = sum(stepper.seconds(batches))
    events = [e for e in profiled.events() or () if e.cpu_time_total]
    main = max({e.thread for e in events}, key=lambda t: sum(e.thread == t for e in events))

    def in_optimizer(event: Any) -> bool:
        while event is not None:
            if event.name == "bench::optimizer":
                return True
            event = event.cpu_parent
        return False

    found = (
        (e.name, in_optimizer(e), e.self_cpu_time_total / 1e6)
        for e in events
        if e.thread == main and e.name != "bench::optimizer"
    )
    return shares(found, wall=wall)


@contextmanager
def _marked(engine: Any) -> Iterator[None]:
    """Mark what follows the gradients and every collective in a profile inside the context."""
    update = engine._stepper.update

    def marked(*arguments: Any, **options: Any) -> Any:
        with record_function("bench::optimizer"):
            return update(*arguments, **options)

    mark = functools.partial(record_function, "bench::communication")
    with mock.patch.object(engine._stepper, "update", marked), around_collectives(mark):
        yield


def write_bert_base(folder: Path) -> Path:
    """Save a BERT-base shape with random weights and return where."""
    torch.manual_seed(0)
    BertModel(BertConfig()).save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    return folder


def run_setting(
    folder: Path, *, path: str, precision: str, rows: int, steps: int
) -> dict[str, Any]:
    """Return the numbers of a model, precision and batch."""
    recipe = write_recipe(
        Job(folder, 0, 100),
        name="step",
        model={"path": path},
        engine={"zero_stage": 2, "precision": precision},
        train={
            "max_duration": "100ep",
            "global_batch_size": RANKS * rows,
            "micro_batch_size": rows,
        },
    )
    prepare_shards(recipe)
    call = functools.partial(measure_rank, steps=steps, precision=precision)
    return on_ranks(call, str(recipe), str(folder / "run"))


def claims_of(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Return what must hold: the best batch of each precision."""
    claims: list[Claim] = []
    for precision in ("fp32", "bf16"):
        found = [r["mfu"] for r in rows if r["shape"] == BERT_BASE and r["precision"] == precision]
        name = f"MFU at hidden 768, {precision}, %"
        value = max(found, default=None)
        claims.append(claim(name, value=value, bound=60.0, direction="at least"))
    return claims


def profile_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the profile table, a column for each setting, and its columns."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["profile"]))
    columns = PROFILE | {
        str(i): f"{r['shape'].partition(',')[0]} {r['precision']} x{r['rows']}"
        for i, r in enumerate(rows)
    }
    table = [
        {"kind": kind} | {str(i): 100 * row["profile"].get(kind, 0.0) for i, row in enumerate(rows)}
        for kind in kinds
    ]
    return table, columns


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    options = parse_arguments(__doc__ or "", arguments)
    settings, steps = (QUICK, 2) if options.quick else (SETTINGS, 6)
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_mixed(folder, rows=1024)
        paths = {MINILM: MODEL}
        if any(shape == BERT_BASE for shape, *_ in settings):
            paths[BERT_BASE] = str(write_bert_base(folder / "bert-base"))
        for shape, precision, rows in settings:
            found = run_setting(
                folder, path=paths[shape], precision=precision, rows=rows, steps=steps
            )
            table.append({"shape": shape, "precision": precision, "rows": rows, **found})
            say(f"{shape}, {precision}, {rows} rows a rank: {found['step_s']:.2f} s a step")
    say(markdown_table(table, columns=COLUMNS))
    say()
    kinds, columns = profile_rows(table)
    say(markdown_table(kinds, columns=columns))
    packages = ("torch", "deepspeed", "transformers", "dist-ft")
    return report(table, claims=claims_of(table), packages=packages, options=options)


if __name__ == "__main__":
    sys.exit(main())
