"""The commands `dist-ft data ...`: look at prepared data; imports as in the command line."""

from __future__ import annotations

from typing import Annotated

import typer

from dist_ft.cli_arguments import OverridesArgument, RecipeArgument

BAD_INPUT = 2

data_app = typer.Typer(
    help="Verify, count and show prepared data, and which rows a step uses.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@data_app.command()
def verify(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Read every byte of every prepared split and compare it with what was written."""
    from dist_ft.recipe import load_recipe
    from dist_ft.train.data_commands import verify_splits

    broken = False
    for name, problem in verify_splits(load_recipe(recipe, overrides=overrides or ())):
        broken = broken or problem is not None
        typer.echo(f"{name}: {problem or 'intact'}", err=problem is not None)
    if broken:
        raise typer.Exit(BAD_INPUT)


@data_app.command()
def stats(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Print rows, tokens, truncation and lengths of every prepared split."""
    from dist_ft.recipe import load_recipe
    from dist_ft.train.data_commands import describe_splits

    for line in describe_splits(load_recipe(recipe, overrides=overrides or ())):
        typer.echo(line)


@data_app.command()
def which(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    step: Annotated[int, typer.Option("--step", min=0, help="The optimizer step, from 0.")],
) -> None:
    """Print task, epoch and rows of a training step; prepares the data if need be."""
    from dist_ft.recipe import load_recipe
    from dist_ft.train.data_commands import describe_step

    loaded = load_recipe(recipe, overrides=overrides or ())
    for line in describe_step(loaded, step=step, say=_say):
        typer.echo(line)


@data_app.command()
def show(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    task: Annotated[str, typer.Option("--task", help="The task's name.")],
    augmented: Annotated[
        bool, typer.Option("--augmented", help="Raw rows before and after augmentation.")
    ] = False,
    number: Annotated[int, typer.Option("-n", min=1, help="How many rows.")] = 5,
    epoch: Annotated[
        int, typer.Option("--epoch", min=0, help="Of the augmentation; each one is another.")
    ] = 0,
) -> None:
    """Print training rows of a task; prepares the data if need be."""
    from dist_ft.recipe import load_recipe
    from dist_ft.train.data_commands import show_augmented, show_rows

    loaded = load_recipe(recipe, overrides=overrides or ())
    if augmented:
        lines = show_augmented(loaded, task=task, number=number, epoch=epoch, say=_say)
    else:
        lines = show_rows(loaded, task=task, number=number, say=_say)
    for line in lines:
        typer.echo(line)


def _say(text: str) -> None:
    typer.echo(text, err=True)
