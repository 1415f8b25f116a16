"""Arguments that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

RecipeArgument = Annotated[
    str, typer.Argument(help="A YAML file, or the name of a packaged recipe.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Changes to the recipe: optim.lr=3e-5, tasks.trec.max_length=64. "
        "Relative paths start where the recipe's own do.",
    ),
]
ReplaceOption = Annotated[
    bool,
    typer.Option("--replace", help="Also replace shards that were made with another tokenizer."),
]
BestOption = Annotated[
    bool, typer.Option("--best", help="Each task's weights at its best evaluation.")
]
LoraOption = Annotated[
    Literal["merged", "adapter"],
    typer.Option("--lora", help="Adapters added to the weights, or alone for peft."),
]
AnalysisOption = Annotated[
    bool,
    typer.Option(
        "--analysis",
        help="Look into the model: drift, calibration, confusions, forgetting, robustness.",
    ),
]
AgainstOption = Annotated[
    Path | None,
    typer.Option(
        "--against", help="Another run: print the differences with paired intervals instead."
    ),
]
OverOption = Annotated[
    list[str] | None,
    typer.Option(
        "--over",
        metavar="KEY=KIND:VALUES",
        help="Search values of a recipe key instead of blocks, may be given often: "
        "optim.lr=log:1e-5:1e-3, regularization.mixout=uniform:0.05:0.5, "
        "freezing.depth=int:1:6, regularization.r_drop='choice:null|1|4'.",
    ),
]
TrialsOption = Annotated[
    int, typer.Option("--trials", help="Of --over: candidates, the recipe itself among them.")
]
RoundsOption = Annotated[
    int | None,
    typer.Option(
        "--rounds",
        help="Of --over: population-based training instead of halving. After each round the worst "
        "quarter goes on from the best, with values moved.",
    ),
]
