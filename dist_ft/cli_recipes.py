"""The commands that check recipes, and list, show and copy the packaged ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dist_ft.cli_arguments import OverridesArgument, RecipeArgument

recipes_app = typer.Typer(
    help="List, show or copy the recipes that come with dist_ft.", rich_markup_mode=None
)


_BAD_RECIPE = 2


def check(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="Also whether so many can share a batch.")
    ] = None,
) -> None:
    """Say what is wrong with a recipe, one line each, without its model, all its rows or the hub.

    Notes say what it takes for granted. `prepare` reads every row, `freeze-plan` loads the model.
    """
    from dist_ft.recipe import RecipeError, load_recipe
    from dist_ft.recipe.notes import hub_notes
    from dist_ft.recipe.ranks import check_ranks

    try:
        loaded = load_recipe(recipe, overrides=overrides or ())
        if ranks is not None:
            check_ranks(loaded, ranks)
    except ValueError as error:
        typer.echo("\n".join(error.errors if isinstance(error, RecipeError) else [str(error)]))
        raise typer.Exit(_BAD_RECIPE) from None
    for note in hub_notes(loaded):
        typer.echo(f"note: {note}")
    tasks = ", ".join(task.name for task in loaded.tasks)
    typer.echo(f"{recipe}: no errors ({loaded.name}: {tasks}; freezing {loaded.freezing.policy})")


@recipes_app.callback()
def _recipes(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_recipes()


@recipes_app.command("ls")
def list_recipes() -> None:
    """List the packaged recipes."""
    from dist_ft.recipe import packaged_recipes

    for name, path in packaged_recipes().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        typer.echo(f"{name:<27} {first.removeprefix('# What:').strip()}")


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print a packaged recipe."""
    typer.echo(_packaged(name).read_text(encoding="utf-8"), nl=False)


@recipes_app.command("cp")
def copy_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    target: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="NAME.yaml by default.")
    ] = None,
) -> None:
    """Copy a packaged recipe, to be changed."""
    source = _packaged(name)
    file = target or Path(f"{name}.yaml")
    if file.is_dir():
        file /= source.name
    if file.exists():
        raise ValueError(f"{file} exists already: choose another name or remove it")
    if not file.parent.is_dir():
        raise ValueError(f"{file.parent} is no folder: make it first")
    file.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    typer.echo(f"copied to {file}; its relative paths start from {file.resolve().parent}")


def _packaged(name: str) -> Path:
    from dist_ft.recipe import packaged_recipes

    known = packaged_recipes()
    if name not in known:
        raise ValueError(f"no packaged recipe {name!r}: use one of {', '.join(known)}")
    return known[name]
