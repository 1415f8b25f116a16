"""The command `slurm`, which writes the script of a job, and what that calls; imports as in cli."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dist_ft.cli_arguments import OverridesArgument, RecipeArgument

TimeOption = Annotated[
    str | None, typer.Option("--time", help="Limit of the job, like 8:00:00; then it goes on.")
]
EachOption = Annotated[
    list[str] | None,
    typer.Option(
        "--each",
        help="Overrides of one task of an array, as in --each 'seed=0 name=a-0' --each "
        "'seed=1 name=a-1'.",
    ),
]
ChainOption = Annotated[
    int,
    typer.Option("--chain", min=1, help="With --submit: so many jobs, one after the other."),
]
SbatchOption = Annotated[
    list[str] | None,
    typer.Option("--sbatch", help="Another line for sbatch, like --sbatch=--partition=long."),
]


def slurm(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    nodes: Annotated[int, typer.Option("--nodes", help="Nodes of the job.")] = 1,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", help="0: CPUs.")] = 0,
    cpus_per_node: Annotated[int, typer.Option("--cpus-per-node", help="Cores of a node.")] = 8,
    time: TimeOption = None,
    each: EachOption = None,
    sbatch: SbatchOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="The script, by default NAME.sbatch.")
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Hand it to sbatch.")] = False,
    chain: ChainOption = 1,
) -> None:
    """Write a Slurm script that trains the recipe and goes on after pre-emption or a time limit."""
    from dist_ft.launcher import slurm as jobs
    from dist_ft.recipe import load_recipe

    words = [_absolute(recipe), *(overrides or [])]
    loaded = load_recipe(recipe, overrides=overrides or ())
    for index, more in enumerate(each or []):
        _check_each(words, more, index=index)
    job = jobs.SlurmJob(
        name=loaded.name,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        cpus_per_node=cpus_per_node,
        time=time,
        each=each or (),
        options=sbatch or (),
    )
    file = output or Path(f"{loaded.name}.sbatch")
    file.write_text(job.script(words), encoding="utf-8")
    typer.echo(f"wrote {file}")
    if submit:
        typer.echo(f"submitted {', '.join(jobs.submit(file, times=chain))}")


def slurm_start(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    job: Annotated[str, typer.Option("--job", help="The same each time that it is requeued.")],
    max_idle: Annotated[
        int, typer.Option("--max-idle", min=1, help="Starts in a row without a step of progress.")
    ],
) -> None:
    """Note that a job starts, for its script; fail if its last starts have brought nothing."""
    from dist_ft.launcher.requeues import check_progress
    from dist_ft.recipe import load_recipe

    loaded = load_recipe(recipe, overrides=overrides or ())
    check_progress(loaded.output_dir / loaded.name, job=job, max_idle=max_idle)


def _absolute(recipe: str) -> str:
    """Return a recipe's path from the root: the job may start in another folder."""
    return str(Path(recipe).resolve()) if Path(recipe).is_file() else recipe


def _check_each(words: list[str], more: str, *, index: int) -> None:
    """Check the recipe of a task of an array.

    Raises:
        ValueError: If it is bad, or would write where the others do.
    """
    import shlex

    from dist_ft.recipe import load_recipe

    own = shlex.split(more)
    load_recipe(words[0], overrides=[*words[1:], *own])
    if not any(word.startswith(("name=", "output_dir=")) for word in own):
        raise ValueError(
            f"--each {more!r} (task {index}) has no name of its own: add name=... so that the "
            "tasks do not write into one folder"
        )
