"""The command that checks the kernels on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dist_ft.kernels.checking import Finding

kernels_app = typer.Typer(
    help="Kernels of the hot path: are they right and quick on this machine?",
    rich_markup_mode=None,
    no_args_is_help=True,
)


@kernels_app.callback()
def _kernels() -> None:
    """A group of its own, though it has one command."""


@kernels_app.command("check")
def check_kernels(
    *,
    device: Annotated[
        str | None, typer.Option("--device", help="cuda or cpu; by default a GPU if there is one.")
    ] = None,
    timed: Annotated[bool, typer.Option("--time/--no-time", help="Time them, too.")] = True,
    output: Annotated[
        Path | None, typer.Option("--json", help="Also write what was found to this file.")
    ] = None,
) -> None:
    """Compare every kernel with plain torch, forward and backward; exit 1 if one is wrong."""
    import torch

    from dist_ft.kernels import checking

    where = _device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU"
    typer.echo(f"kernels on {name}, torch {torch.__version__}")
    found = list(checking.check_kernels(where, timed=timed))
    _print(found)
    if where.type == "cpu":
        typer.echo("not measured: anything on a GPU, as this ran on the CPU")
        if checking.interpreted():
            typer.echo("triton ran in its interpreter, which shows numbers but neither speed nor "
                       "races, and cuts bf16 off instead of rounding it")  # fmt: skip
    if output is not None:
        body = {"device": name, "torch": torch.__version__, "rows": [f.as_dict() for f in found]}
        output.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    raise typer.Exit(int(any(f.state == "wrong" for f in found)))


def _device(name: str | None) -> Any:
    import torch

    if name not in (None, "cuda", "cpu"):
        raise ValueError(f"--device: must be cuda or cpu, got {name!r}")
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ValueError(
            "--device: cuda is not there: use --device cpu, or look at `dist-ft doctor`"
        )
    return (
        torch.device("cuda", 0)
        if name == "cuda" or (name is None and there)
        else torch.device("cpu")
    )


def _print(found: list[Finding]) -> None:
    rows: list[tuple[str, ...]] = [
        ("operation", "by", "type", "numbers", "error / allowed", "ms", "/ eager", "note")
    ]
    for one in found:
        figures = (one.error, one.seconds and 1e3 * one.seconds, one.ratio)
        shown = ("-" if figure is None else f"{figure:.2f}" for figure in figures)
        note = one.detail or one.size or ""
        rows.append((one.op, one.implementation, one.dtype, one.state, *shown, note))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())
