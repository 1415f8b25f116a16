"""What do the own kernels cost beside plain torch, in time and in memory?

Each runs a forward and a backward beside its eager reference and, where there is one, the best of
the libraries, in one process and in turn: medians of paired rounds. Peak memory is that of a fresh
process for each (Linux counts its resident pages; a GPU's allocator counts its bytes), beyond what
was there before: inputs are not counted, gradients are.

The Triton kernels need a GPU. Without one they are compiled ahead of time for three, which shows
registers, spills and shared memory, and run in Triton's interpreter, which shows numbers; neither
shows speed.

    python benchmarks/kernels.py [--quick] [--json FILE] [--check] [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository is not on the path
    sys.path[0] = str(Path(__file__).parents[1])
os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1")

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import ROOT, Claim, claim, markdown_table, parse_arguments, report, say
from dist_ft.engine.heap import keep_freed_memory
from dist_ft.kernels.cases import AttentionCase, Case, DropoutCase, NormCase, ScoringCase, inputs
from dist_ft.kernels.checking import paired_times
from dist_ft.kernels.ops import TABLE, Place, has_triton

MIB = 2**20
EAGER = "eager"
TARGETS = ("cuda:80", "cuda:90", "hip:gfx942")
# Programs of their own whose time does not count.
_AT_ONCE = 2
# Rows of TREC, movie reviews and WNUT-16 are about so long.
_LENGTHS = (12, 27, 64, 33, 18, 41, 9, 22)
# The vocabulary of Llama 3, the hidden size of SmolLM2-135M.
_CLASSES, _WIDTH = 128_256, 576
# Tokens and hidden size: a micro-batch of MiniLM, a larger one of BERT.
_DROPPED = ((770, 384), (3072, 768))
COLUMNS = {
    "op": "operation",
    "by": "by",
    "dtype": "type",
    "size": "size",
    "ms": "ms",
    "time_ratio": "/ eager",
    "mib": "peak, MiB",
    "memory_ratio": "/ eager",
}
COMPILED = {
    "target": "target",
    "kernel": "kernel",
    "registers": "registers",
    "spills": "spills",
    "shared_bytes": "shared, bytes",
    "wide_loads": "128-bit loads",
}


@dataclass(frozen=True)
class Contest:
    """One operation on one size, and who runs it.

    Attributes:
        op: its name in the table.
        case: the size; an operation has one contest of each.
        libraries: functions of the case's tensors, by name.
    """

    op: str
    case: Case
    libraries: dict[str, Callable[..., Tensor]]

    def runners(
        self, *, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Callable[..., Tensor]]:
        """Return who can run it here: the table's, plain torch, libraries."""
        case = self.case
        own = {
            one.name: lambda *given, name=one.name: case.run(name, *given)
            for one in TABLE[self.op].implementations
            if one.predicate(Place(device.type, dtype))
        }
        return {**own, EAGER: case.eager, **self.libraries}


def contests(*, device: torch.device, quick: bool) -> list[Contest]:
    """Return what is measured on a device."""
    on_gpu = device.type == "cuda"
    scoring = ScoringCase(8192 if on_gpu else 1024, _WIDTH, _CLASSES)
    # As in BERT's training on a CPU; on GPUs flash attention drops nothing. Planned batches come
    # sorted, so that rows of one length are neighbours.
    attention = AttentionCase(
        tuple(sorted(_LENGTHS * (64 if on_gpu else 4))),
        heads=12, key_heads=12, head_size=32, dropout=0.0 if on_gpu else 0.1,
    )  # fmt: skip
    norm = NormCase(32_768 if on_gpu else 2048, 768, p=0.1)
    compiled = {"torch.compile": torch.compile(norm.eager)} if on_gpu else {}
    return [
        Contest("linear_cross_entropy", scoring, {} if quick else _scorers(scoring, device)),
        Contest("attention", attention, {"torch by run": attention.torch_by_run}),
        Contest("dropout_residual_norm", norm, compiled),
        *(Contest("dropout", DropoutCase(*size, p=0.1, seed=None), {}) for size in _DROPPED),
    ]


def _scorers(case: ScoringCase, device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Return the libraries' ways to the loss: torch's own, at its best on a CPU, and Liger's."""
    found: dict[str, Callable[..., Tensor]] = {}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        # Its automatic choice takes many times as long as this one on a CPU.
        options = torch.nn.LinearCrossEntropyOptions(
            **({} if device.type == "cuda" else {"batch_chunk_size": 128, "chunking_method": None,
                                                "acc_policy": "balanced"})
        )  # fmt: skip

        def torch_chunked(hidden: Tensor, weight: Tensor) -> Tensor:
            labels = case.labels(hidden.device)
            total = F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)
            return total / case.rows

        found["torch chunked"] = torch_chunked
    if device.type == "cuda":
        try:
            from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
                LigerFusedLinearCrossEntropyLoss,
            )
        except ImportError:
            return found
        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found["liger"] = lambda hidden, weight: (
            liger(weight, hidden, case.labels(hidden.device)) / case.rows
        )
    return found


def measure(contest: Contest, *, device: torch.device, options: Any) -> list[dict[str, Any]]:
    """Return a row for each type and runner."""
    rows: list[dict[str, Any]] = []
    # Seconds each on a CPU: what a first call costs there is little beside that.
    long = contest.op == "linear_cross_entropy" and device.type == "cpu"
    for dtype in (torch.float32,) if options.quick else (torch.float32, torch.bfloat16):
        given = inputs(contest.case, device=device, dtype=dtype)
        runners = contest.runners(device=device, dtype=dtype)
        _load_libraries(device=device, dtype=dtype)
        times = paired_times(
            runners,
            given,
            warm_ups=0 if long else 2,
            rounds=2 if long and options.quick else 4 if long else 10,
        )
        del given
        name = str(dtype).removeprefix("torch.")
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = pool.map(
                lambda by, name=name: _peak_in_child(contest, by, dtype=name, options=options),
                runners,
            )
            peaks = dict(zip(runners, found, strict=True))
        for by in runners:
            ratios = [a / b for a, b in zip(times[by], times[EAGER], strict=True)]
            rows.append(
                {
                    "op": contest.op,
                    "by": by,
                    "dtype": name,
                    "size": contest.case.size,
                    "ms": 1e3 * statistics.median(times[by]),
                    "time_ratio": statistics.median(ratios),
                    "time_ratios": ratios,
                    "mib": peaks[by],
                    "memory_ratio": peaks[by] / peaks[EAGER],
                }
            )
    return rows


def _load_libraries(*, device: torch.device, dtype: torch.dtype) -> None:
    """Let libraries load and keep what their first call needs: it is no operation's own."""
    little = torch.ones(64, 64, device=device, dtype=dtype, requires_grad=True)
    F.cross_entropy((little @ little).float(), torch.arange(64, device=device)).backward()


def _peak_in_child(contest: Contest, by: str, *, dtype: str, options: Any) -> float:
    """Return the MiB that a forward and a backward take in a process of their own."""
    words = [
        "--peak",
        contest.op,
        contest.case.size,
        by,
        dtype,
        *(["--quick"] if options.quick else []),
    ]
    done = _python("benchmarks.kernels", *words, "--device", options.device)
    return json.loads(done.splitlines()[-1])


def peak_mib(contest: Contest, by: str, *, device: torch.device, dtype: torch.dtype) -> float:
    """Return what this process needs for one forward and backward beyond what it has now."""
    given = inputs(contest.case, device=device, dtype=dtype)
    run = contest.runners(device=device, dtype=dtype)[by]
    _load_libraries(device=device, dtype=dtype)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
    output = run(*given)
    gradients = torch.autograd.grad(output, given, torch.ones_like(output))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")
    del gradients
    return (peak - before) / MIB


def _status(key: str) -> int:
    (kib,) = re.findall(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kib)


def compiled_kernels(target: str) -> list[dict[str, Any]]:
    """Return what the compiler for a target says of the Triton kernels."""
    lines = _python("tests.helpers.triton_targets", target).splitlines()
    return [{"target": target, **json.loads(line)} for line in lines]


def interpreted_numbers() -> list[dict[str, Any]]:
    """Return what ``dist-ft kernels check`` finds out about them in Triton's interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        words = ("kernels", "check", "--device", "cpu", "--no-time", "--json", str(file))
        _python("dist_ft", *words, TRITON_INTERPRET="1")
        return [r for r in json.loads(file.read_text())["rows"] if r["implementation"] == "triton"]


def _python(module: str, *words: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{module} {' '.join(words)}: {done.stderr[-2000:]}")
    return done.stdout


def claims_of(
    rows: Sequence[dict[str, Any]],
    compiled: Sequence[dict[str, Any]],
    interpreted: Sequence[dict[str, Any]],
) -> list[Claim]:
    """Return what must hold."""
    own = [r for r in rows if r["by"] == "chunked"]
    text = "linear + cross-entropy, 128k vocabulary"
    found = [
        claim(f"{text}, {r['dtype']}: {what} / eager", value=r[key], bound=bound,
              direction="at most")
        for r in own
        for what, key, bound in (("peak", "memory_ratio", 0.35), ("time", "time_ratio", 1.1))
    ]  # fmt: skip
    found += [
        claim(f"dropout by bytes, {r['size']}, {r['dtype']}: time / eager",
              value=r["time_ratio"], bound=0.4, direction="at most")
        for r in rows if r["by"] == "by_byte"
    ]  # fmt: skip
    for target in TARGETS if compiled else ():
        spills = sum(r["spills"] for r in compiled if r["target"] == target)
        name = f"Triton kernels compiled for {target}: spills"
        found.append(claim(name, value=spills, bound=0, direction="at most"))
    found += [
        claim(
            f"Triton kernels interpreted, {r['dtype']}: error / allowed",
            value=r["error"] if r["state"] == "right" else None,
            bound=1.0,
            direction="at most",
        )
        for r in interpreted
    ]
    return found


def _more(parser: argparse.ArgumentParser) -> None:
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=here)
    parser.add_argument(
        "--peak", nargs=4, metavar=("OP", "SIZE", "BY", "TYPE"), help=argparse.SUPPRESS
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    options = parse_arguments(__doc__ or "", arguments, more=_more)
    device = torch.device(options.device)
    torch.set_num_threads(1)
    if options.peak:
        op, size, by, dtype = options.peak
        everything = contests(device=device, quick=options.quick)
        (contest,) = [c for c in everything if (c.op, c.case.size) == (op, size)]
        say(json.dumps(peak_mib(contest, by, device=device, dtype=getattr(torch, dtype))))
        return 0
    if device.type == "cpu":
        keep_freed_memory()  # as `dist-ft train` does
    rows: list[dict[str, Any]] = []
    for contest in contests(device=device, quick=options.quick):
        rows += measure(contest, device=device, options=options)
    say(markdown_table(rows, columns=COLUMNS))
    compiled: list[dict[str, Any]] = []
    interpreted: list[dict[str, Any]] = []
    if has_triton():
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            numbers = pool.submit(interpreted_numbers)
            compiled = list(itertools.chain(*pool.map(compiled_kernels, TARGETS)))
            interpreted = numbers.result()
    if device.type == "cpu":
        say("\nnot measured: no GPU. What can be said of the Triton kernels without one:\n")
    say(markdown_table(compiled, columns=COMPILED) if compiled else "Triton is not installed")
    packages = ("torch", "triton", "liger-kernel", "dist-ft")
    claims = claims_of(rows, compiled, interpreted)
    return report([*rows, *compiled, *interpreted], claims=claims, packages=packages,
                  options=options)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
