"""Compile our Triton kernels for a GPU that is not there; run as a program, one target each.

    python -m tests.helpers.triton_targets cuda:80

The operations are called as always, on CPU tensors, and each launch is compiled with the launcher's
own specialisation, but nothing is executed. Prints one JSON object for each kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# (width, dtype): MiniLM, BERT-base, BERT-large, what is widest; an odd width; float32 once.
SHAPES = (
    (384, torch.bfloat16), (768, torch.bfloat16), (1024, torch.bfloat16), (1024, torch.float32),
    (4096, torch.bfloat16), (1000, torch.float16),
)  # fmt: skip
WIDE_LOADS = {"cuda": r"LDG\.E[\w.]*\.128", "hip": r"(global|buffer)_load_dwordx4"}


def target_of(name: str) -> GPUTarget:
    """Return the target named ``cuda:80`` or ``hip:gfx942``."""
    kind, _, arch = name.partition(":")
    return GPUTarget("cuda", int(arch), 32) if kind == "cuda" else GPUTarget("hip", arch, 64)


def compile_launches(target: GPUTarget) -> list[tuple[str, Any]]:
    """Return name and compiled kernel of each launch of forward and backward passes."""
    driver.set_active(
        SimpleNamespace(  # pyright: ignore[reportArgumentType]
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda _device: 0,
            get_active_torch_device=lambda: torch.device("cpu"),
        )
    )
    made: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        made.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    from dist_ft.kernels import triton_dropout_norm as kernels

    for width, dtype in SHAPES:
        x, r = (torch.zeros(64, width, dtype=dtype, requires_grad=True) for _ in range(2))
        w, b = (torch.ones(width, dtype=dtype, requires_grad=True) for _ in range(2))
        before = len(made)
        kernels.dropout_residual_norm(x, r, w, b, p=0.1, eps=1e-12).sum().backward()
        made[before:] = [(f"{n} {width} {str(dtype)[6:]}", k) for n, k in made[before:]]
    return made


def usage(kernel: Any, target: GPUTarget) -> dict[str, int]:
    """Return registers, spilled registers or bytes, shared memory and wide loads of a kernel."""
    shared = int(kernel.metadata.shared)
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]

        def count(name: str) -> int:
            return max(int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", text))

        spills = count("vgpr_spill_count") + count("sgpr_spill_count")
        registers = count("vgpr_count")
        code = text
    else:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            text, code = (
                subprocess.run(
                    [tool, *words, file.name], capture_output=True, text=True, check=True
                ).stdout
                for words in (["--dump-resource-usage"], ["-sass"])
            )
        registers = int(re.findall(r"REG:(\d+)", text)[0])
        spills = int(re.findall(r"STACK:(\d+)", text)[0])
        spills += int(re.findall(r"LOCAL:(\d+)", text)[0])
    wide = len(re.findall(WIDE_LOADS[target.backend], code))
    return {"registers": registers, "spills": spills, "shared_bytes": shared, "wide_loads": wide}


if __name__ == "__main__":
    wanted = target_of(sys.argv[1])
    for launch, compiled in compile_launches(wanted):
        print(json.dumps({"kernel": launch, **usage(compiled, wanted)}))  # noqa: T201
