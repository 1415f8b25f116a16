"""Run our Triton kernels in Triton's interpreter and print what was found, as JSON.

A process of its own: the interpreter is chosen when the kernels' module is imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch

from dist_ft.kernels import triton_dropout_norm as kernels
from dist_ft.kernels.cases import NormCase
from dist_ft.kernels.self_tests import check

CPU = torch.device("cpu")
SHAPES = ((9, 40), (5, 33), (1, 16), (16, 64))
# What a wrong backward kernel looks like: each line is replaced, and gradcheck must see it.
MUTATIONS = {
    "mean": ("(dn - tl.sum(dn, axis=0) / N - normal * along)", "(dn - normal * along)"),
    "projection": (" - normal * along) * scale", ") * scale"),
    "mask": ("== 1, dz * SCALE, 0.0)", "== 0, dz * SCALE, 0.0)"),
    "weight": ("dw += dy * normal", "dw += dy"),
}


def gradcheck(module: Any, *, rows: int = 5, width: int = 6, p: float = 0.3) -> bool:
    """Return whether float64 gradients equal finite differences, under one mask."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((rows, width), (rows, width), (width,), (width,))
    given = [torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes]

    def run(*tensors: Any) -> Any:
        torch.manual_seed(4)
        return module.dropout_residual_norm(*tensors, p=p, eps=1e-5)

    return torch.autograd.gradcheck(run, given, raise_exception=False, fast_mode=True)


def mutated(line: str, wrong: str) -> Any:
    """Return the kernels' module with one expression replaced."""
    source = Path(kernels.__file__).read_text()
    assert source.count(line) == 1, line
    path = Path(tempfile.mkdtemp()) / "mutated.py"
    path.write_text(source.replace(line, wrong))
    spec = importlib.util.spec_from_file_location("mutated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutated"] = module
    spec.loader.exec_module(module)
    return module


def _errors() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for rows, width in SHAPES:
            name = f"{str(dtype)[6:]} {rows}x{width}"
            try:
                check(NormCase(rows, width, p=0.25), "triton", device=CPU, dtype=dtype)
                found[name] = None
            except RuntimeError as error:
                found[name] = str(error)
    return found


def _masks() -> dict[str, Any]:
    rows, width = 203, 130
    first, again, other = (
        kernels.keep_mask(rows, width, p=0.1, seed=s, device=CPU) for s in (7, 7, 8)
    )
    return {
        "same": torch.equal(first, again),
        "agree": float((first == other).float().mean()),
        "kept": float(first.float().mean()),
        "rows": [float(r) for r in first.float().mean(1)[:8]],
        "neighbours": float((first[:-1] * first[1:]).float().mean()),
    }


if __name__ == "__main__":
    results = {
        "errors": _errors(),
        "masks": _masks(),
        "gradcheck": gradcheck(kernels),
        "rare": gradcheck(kernels, p=1e-9),
        # Small: what fails is done again one element after the other, for torch's message.
        "mutations": {
            name: gradcheck(mutated(*pair), rows=2, width=3) for name, pair in MUTATIONS.items()
        },
        "small": gradcheck(kernels, rows=2, width=3),
    }
    print(json.dumps(results))  # noqa: T201
