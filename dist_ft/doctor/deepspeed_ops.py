"""DeepSpeed's compiled operations: which are there, which can be, and what the others need.

A run needs none of them: the optimizer is torch's, and the communication gloo's or NCCL's. They
matter to those who ask for more in a DeepSpeed JSON of their own.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_ft.doctor.findings import Finding
from dist_ft.doctor.places import extensions_folder

# What a DeepSpeed JSON (engine.deepspeed) must say to make a run load an operation.
ASKED_FOR_BY: Mapping[str, str] = {
    "async_io": "offload_*.device: nvme",
    "pin_memory": "offload_*.device: nvme",
    "gds": "aio.use_gds",
    "quantizer": "zero_quantized_weights, zero_quantized_gradients",
    "fp_quantizer": "quantized weights in 6 to 12 bits",
}


def deepspeed_ops() -> Iterator[Finding]:
    """Yield DeepSpeed's operations by what it takes to use them, a line for each kind."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    built: list[str] = []
    possible: list[str] = []
    impossible: list[str] = []
    tools = all(shutil.which(tool) for tool in ("g++", "ninja"))
    for name, builder in sorted(ALL_OPS.items()):
        if "not_implemented" in name:
            continue
        problem = _problem(builder)
        if installed_ops.get(name) or (extensions_folder() / name / f"{name}.so").is_file():
            built.append(name)
        elif problem is None and tools:
            possible.append(name)
        else:
            use = f"for {ASKED_FOR_BY[name]}: " if name in ASKED_FOR_BY else ""
            impossible.append(f"{name} ({use}{problem or 'needs g++ and ninja'})")
    yield Finding("deepspeed ops, built", ", ".join(built) or "none (no run needs one)")
    yield Finding("deepspeed ops, compiled on demand", ", ".join(possible) or "none")
    if impossible:
        remedy = "only for those who ask for them in engine.deepspeed"
        yield Finding("deepspeed ops, not possible", ", ".join(impossible), "note", remedy)


def _problem(builder: Any) -> str | None:
    """Return what keeps an operation from being compiled, in DeepSpeed's words, or None."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            if builder.is_compatible(verbose=True):
                return None
        # Builders raise what their checks run into, such as a missing nvcc.
        except Exception as error:  # noqa: BLE001
            return " ".join(str(error).split())
    lines = [re.sub(r"\x1b\[\d+m|\[WARNING\]", "", t).strip() for t in said.getvalue().splitlines()]
    reason = next((line for line in lines if line), "DeepSpeed doesn't say why")
    return reason.removeprefix(f"{builder.name}: ").removeprefix(f"{builder.name} ").strip(" .")


def stale_locks(*, older_than_s: float, now_s: float) -> list[Path]:
    """Return lock files of compilations that have been held for so long that nobody compiles."""
    return [
        lock
        for lock in sorted(extensions_folder().glob("*/lock"))
        if now_s - lock.stat().st_mtime > older_than_s
    ]
