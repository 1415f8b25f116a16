"""The Triton kernels without a GPU: numbers by the interpreter, budgets by the compilers.

What this can't show: speed, races, and rounding of bf16 on a device (the interpreter truncates).
"""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# On Linux the extra [dev] brings Triton: there it is missing, not left out.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux"),
]

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "dist_ft" / "kernels").glob("triton_*.py"))


def _run(module: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return json.loads(_run("tests.helpers.triton_interpreted").splitlines()[-1])


def test_outputs_and_gradients_are_right_in_odd_shapes(interpreted: dict[str, Any]) -> None:
    assert len(interpreted["errors"]) == 16
    assert {name: e for name, e in interpreted["errors"].items() if e} == {}


def test_gradcheck_holds_and_sees_each_mutation(interpreted: dict[str, Any]) -> None:
    assert interpreted["gradcheck"]
    assert interpreted["small"]
    assert interpreted["rare"]  # less dropout than is ever drawn
    assert interpreted["mutations"] == dict.fromkeys(
        ("mean", "projection", "mask", "weight"), False
    )


def test_masks_are_reproducible_and_independent(interpreted: dict[str, Any]) -> None:
    masks = interpreted["masks"]
    assert masks["same"]
    # 26,390 draws: five standard deviations are 0.009; of one row of 130, 0.13.
    assert abs(masks["kept"] - 0.9) < 0.009
    assert abs(masks["agree"] - 0.82) < 0.012
    assert abs(masks["neighbours"] - 0.81) < 0.013
    assert all(abs(kept - 0.9) < 0.13 for kept in masks["rows"])


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_compiled_kernels_keep_their_budget(target: str) -> None:
    found = [json.loads(line) for line in _run("tests.helpers.triton_targets", target).splitlines()]
    assert len(found) == 12
    for kernel in found:
        assert kernel["spills"] == 0, kernel
        assert kernel["registers"] <= 128, kernel
        assert kernel["shared_bytes"] <= 48 * 1024, kernel


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_use_nothing_that_the_interpreter_gets_wrong(path: Path) -> None:
    """Values are loaded with a cast and stored with one; no atomics, libdevice, assembly, dots."""
    tree = ast.parse(path.read_text())
    kernels = [
        f
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in f.decorator_list)
    ]
    assert kernels
    for node in (n for kernel in kernels for n in ast.walk(kernel)):
        text = ast.unparse(node)
        if not isinstance(node, ast.Call):
            continue
        for bad in ("atomic", "libdevice", "inline_asm", "tl.dot"):
            assert bad not in text, text
        if text.startswith("tl.load(") and ".to(" not in text and "_in + row" not in text:
            assert f"{text}.to(COMPUTE)" in path.read_text().replace("\n", ""), text
