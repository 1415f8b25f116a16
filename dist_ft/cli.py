"""The command line; what a command needs is imported when it runs, so that help is quick."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_ft.cli_arguments import (
    AgainstOption,
    AnalysisOption,
    BestOption,
    LoraOption,
    OverOption,
    OverridesArgument,
    RecipeArgument,
    ReplaceOption,
    RoundsOption,
    TrialsOption,
)
from dist_ft.cli_data import data_app
from dist_ft.cli_kernels import kernels_app
from dist_ft.cli_launch import launch_command
from dist_ft.cli_recipes import check, recipes_app
from dist_ft.cli_slurm import slurm, slurm_start
from dist_ft.cli_tables import print_differences, print_metrics
from dist_ft.heartbeat import (
    error_text,
    is_first_to_tell,
    is_passing,
    note_error,
    show_stacks_when_asked,
)
from dist_ft.planning.hardware import HARDWARE

if TYPE_CHECKING:
    from dist_ft.config import Recipe

FAILED = 1
BAD_INPUT = 2
PREEMPTED = 75

app = typer.Typer(
    name="dist-ft",
    help="Fine-tune several tasks on one pre-trained transformer, on one or many ranks.\n\n"
    "Exit codes: 0 done, 1 failed, 2 bad recipe or arguments, 75 stopped after saving "
    "(start again with --resume), 143 (launch) stopped before all was saved.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(recipes_app, name="recipes", invoke_without_command=True)
app.add_typer(data_app, name="data")
app.add_typer(kernels_app, name="kernels")
app.command()(check)
app.command()(slurm)
app.command("slurm-start", hidden=True)(slurm_start)

RunArgument = Annotated[Path, typer.Argument(help="The folder of a run.")]


@app.callback(invoke_without_command=True)
def _top(
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    del debug  # main() takes it out of the arguments, so that it may stand anywhere
    if version:
        from dist_ft.version import __version__

        typer.echo(f"dist-ft {__version__}")
        raise typer.Exit


@app.command()
def prepare(
    recipe: RecipeArgument, overrides: OverridesArgument = None, replace: ReplaceOption = False
) -> None:
    """Turn the recipe's data into tokenised shards; quick if they are there already."""
    loaded = _load(recipe, overrides)
    from dist_ft.train import data_commands

    data_commands.prepare(loaded, replace=replace)


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the latest checkpoint, if there is one.")
    ] = False,
    nproc: Annotated[int | None, typer.Option("--nproc", hidden=True)] = None,
) -> None:
    """Train on one rank; `dist-ft launch train RECIPE` starts several, and restarts them."""
    if nproc is not None:
        raise ValueError(
            f"--nproc: train is one rank: several are started by `dist-ft launch --nproc {nproc} "
            f"train {recipe}`"
        )
    loaded = _load(recipe, overrides)
    import torch

    from dist_ft.engine.heap import keep_freed_memory
    from dist_ft.train import build

    if not torch.cuda.is_available():
        keep_freed_memory()
    raise typer.Exit(build.train(loaded, resume=resume))


@app.command()
def evaluate(
    run: RunArgument, *, analysis: AnalysisOption = False, against: AgainstOption = None
) -> None:
    """Score the validation and test splits with the run's latest weights."""
    _require_run(run)
    from dist_ft.train import finished

    if against is not None:
        _require_run(against)
        print_differences(finished.compare(run, against))
        return
    print_metrics(finished.evaluate(run))
    if analysis:
        typer.echo(f"wrote {finished.analyse(run)}: `dist-ft report {run}` shows it")


@app.command()
def export(
    run: RunArgument,
    *,
    task: Annotated[str | None, typer.Option("--task", help="Only this task.")] = None,
    best: BestOption = False,
    lora: LoraOption = "merged",
    replace: Annotated[
        bool, typer.Option("--replace", help="Let an earlier export give way to this one.")
    ] = False,
) -> None:
    """Write a plain transformers folder for each task."""
    _require_run(run)
    from dist_ft.train import finished

    how = finished.ExportOptions(best=best, lora=lora, replace=replace)
    for folder in finished.export(run, task=task, how=how):
        typer.echo(f"exported {folder}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs.")],
) -> None:
    """Write an HTML page about one run, or about several side by side."""
    for run in runs:
        _require_run(run)
    from dist_ft.report import write_report

    typer.echo(f"report {write_report(runs)}")


@app.command()
def watch(
    run: RunArgument,
    *,
    once: Annotated[bool, typer.Option("--once", help="Print it as it is now and end.")] = False,
) -> None:
    """Show a run in the terminal while it trains; works over ssh, beside any number of ranks."""
    from dist_ft.watch import watch as show

    show(run, once=once)


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    nodes: Annotated[int, typer.Option("--nodes", help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option("--gpus", help="Accelerators of each.")] = 1,
    gpu: Annotated[str, typer.Option("--gpu", help=f"Which: {', '.join(HARDWARE)}.")] = "h100-80g",
    epoch_steps: Annotated[
        int | None,
        typer.Option("--epoch-steps", help="Optimizer steps of an epoch; else by prepared data."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--json", help="Also write the plan to this file.")
    ] = None,
) -> None:
    """Say what a run will need, phase by phase, and whether it fits; loads no weights or data."""
    loaded = _load(recipe, overrides, needs_files=False)
    from dist_ft.planning.run import PlanRequest, plan_recipe, report_plan

    request = PlanRequest(nodes, gpus, gpu, epoch_steps)
    report_plan(plan_recipe(loaded, request), output=output)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The other trainer's file.")],
    *,
    kind: Annotated[
        str,
        typer.Option(
            "--from", help="hf-trainer-args, axolotl, llama-factory or finetuning-scheduler."
        ),
    ],
    ranks: Annotated[int, typer.Option("--ranks", help="On how many ranks it ran.")] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", help="A new file; printed by default.")
    ] = None,
) -> None:
    """Write a recipe from another trainer's configuration, and list what it leaves open."""
    from dist_ft.importing.run import import_recipe

    if output is not None and output.exists():
        raise ValueError(f"--output: {output} exists already: choose another name or remove it")
    found = import_recipe(file, kind=kind, ranks=ranks)
    if output is None:
        typer.echo(found.text, nl=False)
        return
    output.write_text(found.text, encoding="utf-8")
    typer.echo("\n".join([*found.notes, f"recipe {output}"]))


@app.command("freeze-plan")
def freeze_plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    output: Annotated[
        Path | None, typer.Option("--output", help="A new file; printed by default.")
    ] = None,
    periods: Annotated[
        int | None,
        typer.Option("--periods", help="Of random_block, how many to list; by default all."),
    ] = None,
) -> None:
    """Write the recipe's phases as an explicit `freezing:` section that can be edited and used."""
    loaded = _load(recipe, overrides)
    from dist_ft.train.freeze_plan import write_freeze_plan

    text = write_freeze_plan(loaded, output=output, periods=periods)
    typer.echo(text, nl=False) if output is None else typer.echo(f"freeze plan {output}")


@app.command()
def search(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    budget: Annotated[
        float,
        typer.Option("--budget", help="At most this share of training every candidate fully."),
    ] = 0.35,
    granule: Annotated[
        int, typer.Option("--granule", help="Search in steps of this many transformer blocks.")
    ] = 1,
    over: OverOption = None,
    trials: TrialsOption = 16,
    rounds: RoundsOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the search that is there.")
    ] = False,
) -> None:
    """Find which blocks to train, or values of keys, by validation score; write the recipe."""
    from dist_ft.search import population, run, tune

    if rounds is not None:
        outcome = population.tune_population(
            lambda more: _load(recipe, [*(overrides or ()), *more]),
            over=over or (), count=trials, rounds=rounds, resume=resume,
        )  # fmt: skip
    elif over:
        outcome = tune.tune(
            lambda more: _load(recipe, [*(overrides or ()), *more]),
            options=tune.TuneOptions(tuple(over), trials, budget), resume=resume,
        )  # fmt: skip
    else:
        loaded = _load(recipe, overrides)
        outcome = run.search(loaded, options=run.SearchOptions(budget, granule), resume=resume)
    if outcome.table:
        typer.echo(outcome.table)
    raise typer.Exit(outcome.exit_code)


@app.command()
def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="Whose folders to look at; else this folder."),
    ] = None,
    overrides: OverridesArgument = None,
    *,
    node: Annotated[
        bool, typer.Option("--node", help="Only what differs from node to node, for Slurm jobs.")
    ] = False,
) -> None:
    """Look at versions, devices, ranks, disks, kernels and known problems; 1 if one is broken.

    Started by a launcher (`dist-ft launch doctor`) it measures between the launcher's ranks.
    """
    from dist_ft import doctor

    rank = int(os.environ.get("RANK", "0"))
    folders = None
    if recipe is not None:
        loaded = _load(recipe, overrides, needs_files=False)
        folders = doctor.folders_of(loaded)
    if node:
        findings = doctor.examine_node(folders)
    else:
        findings = doctor.examine(folders) if rank == 0 else doctor.examine_rank()
    doctor.print_findings(findings, rank=rank)
    raise typer.Exit(FAILED if any(finding.is_broken for finding in findings) else 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code.

    Args:
        arguments: The command line without the program's name; that of this process by default.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    show_stacks_when_asked()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Started by torchrun itself, which leaves its ranks behind when it is killed.
        from dist_ft.launcher.processes import die_with

        die_with(os.getppid())
    return _run([word for word in words if word != "--debug"], debug=debug)


# Everything behind its own options belongs to the command that it runs.
app.command("launch", context_settings={"allow_interspersed_args": False})(launch_command(main))


def _run(words: list[str], *, debug: bool) -> int:
    try:
        app(words)
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except ValueError as error:
        _report_error(error, debug=debug)
        return FAILED if is_passing(error) else BAD_INPUT
    except (RuntimeError, OSError) as error:
        _report_error(error, debug=debug)
        return getattr(error, "exit_code", FAILED)
    return 0


def _report_error(error: Exception, *, debug: bool) -> None:
    """Say what is wrong on one line; what several ranks of a node find alike, once."""
    if debug:
        traceback.print_exc()
    rank = os.environ.get("RANK", "0")
    lines = getattr(error, "errors", None)
    if isinstance(lines, list):
        # A RecipeError: every rank reads the same file and finds the same.
        if rank == "0":
            typer.echo("\n".join(f"error: {line}" for line in lines), err=True)
        return
    note_error(error)
    text = error_text(error)
    if not is_first_to_tell(text):
        return
    prefix = f"[rank {rank}] " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    typer.echo(f"{prefix}error: {text}", err=True)


def _load(recipe: str, overrides: list[str] | None, *, needs_files: bool = True) -> Recipe:
    from dist_ft.recipe import load_recipe

    return load_recipe(recipe, overrides=overrides or (), needs_files=needs_files)


def _require_run(run: Path) -> None:
    if not (run / "recipe.json").is_file():
        raise ValueError(f"{run} holds no run (no recipe.json): name a folder that train has made")
