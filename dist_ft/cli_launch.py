"""The command `launch`: starts the ranks of this node and brings them back; imports as in cli."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dist_ft.launcher.processes import StartRank

NprocOption = Annotated[
    int | None,
    typer.Option("--nproc", help="Ranks on this node; by default the GPUs, or 2 without one."),
]
RestartsOption = Annotated[
    int, typer.Option("--max-restarts", help="How often failed ranks are started again.")
]
GraceOption = Annotated[
    float, typer.Option("--grace-s", help="Seconds that ranks get to save when asked to stop.")
]
NodesOption = Annotated[int, typer.Option("--nnodes", help="Nodes of the run.")]
NodeRankOption = Annotated[int, typer.Option("--node-rank", help="This node, from 0.")]
HeadOption = Annotated[str, typer.Option("--head-node", help="Name of node 0.")]
PortOption = Annotated[
    int, typer.Option("--port", help="A free port of node 0; needed for several nodes.")
]
ModuleOption = Annotated[
    str, typer.Option("--module", hidden=True, help="What a rank runs: python -m MODULE WORDS.")
]
WordsArgument = Annotated[
    list[str], typer.Argument(metavar="COMMAND ...", help="For example: train RECIPE --resume")
]

# What a restart brings further, and what saves when it is asked to stop. Any other command would
# only fail again.
_GOES_ON = ("train", "search")

Main = Callable[[list[str]], int]


def launch_command(main: Main) -> Callable[..., None]:
    """Return the command; `main` is what a rank runs, with the words of its command line."""

    def launch(
        words: WordsArgument,
        *,
        nproc: NprocOption = None,
        max_restarts: RestartsOption = 3,
        grace_s: GraceOption = 120.0,
        nnodes: NodesOption = 1,
        node_rank: NodeRankOption = 0,
        head_node: HeadOption = "127.0.0.1",
        port: PortOption = 0,
        module: ModuleOption = "dist_ft",
    ) -> None:
        """Run a command on all ranks of this node; go on from the last checkpoint if one fails.

        A rank that dies or hangs (recipe section `supervision`) is named, the others are ended, and
        all start again, which resumes by itself. Killing this process ends its ranks.
        """
        from dist_ft.launcher.output import let_go_of_lost_output
        from dist_ft.launcher.settings import LaunchSettings, Place, count_gpus, thread_settings
        from dist_ft.launcher.supervisor import Supervisor

        gpus = count_gpus()
        own = module == "dist_ft"
        settings = LaunchSettings(
            ranks=nproc if nproc is not None else gpus or 2,
            place=Place(nnodes, node_rank, head_node, port),
            max_restarts=max_restarts if not own or words[0] in _GOES_ON else 0,
            grace_s=grace_s,
        )
        if 0 < gpus < settings.ranks:
            raise ValueError(
                f"NPROC is {settings.ranks} but there are {gpus} GPUs: a GPU holds one rank"
            )
        # A bad recipe ends here, before any rank starts.
        logs = _checked_logs(words, ranks=settings.world_size) if own else None
        os.environ.update(thread_settings(ranks=settings.ranks, gpus=gpus))
        # Where there are GPUs a fork could find a CUDA context that it cannot use.
        start = _starter(words, main=main if own and gpus == 0 else None, module=module)
        code = Supervisor(settings, start=start, say=_say, logs=logs).run()
        let_go_of_lost_output()
        raise typer.Exit(code)

    return launch


def _checked_logs(words: Sequence[str], *, ranks: int) -> Path | None:
    """Return where the logs of a training run go; None for another command.

    Raises:
        ValueError: If the recipe is bad, `ranks` can't share its batches, or its folder holds
            another run.
    """
    if words[0] != "train":
        return None
    from dist_ft.recipe import load_recipe
    from dist_ft.recipe.ranks import check_ranks
    from dist_ft.train.run_folder import RunFolder

    recipe, *overrides = [word for word in words[1:] if not word.startswith("--")] or [""]
    loaded = load_recipe(recipe, overrides=overrides)
    check_ranks(loaded, ranks)
    folder = RunFolder(loaded.output_dir / loaded.name)
    folder.check(loaded.model_dump(mode="json"), resume="--resume" in words)
    return folder.root / "logs"


def _starter(words: Sequence[str], *, main: Main | None, module: str) -> Callable[[int], StartRank]:
    """Return what starts ranks: forks that run `main`, or without it new interpreters."""
    from dist_ft.launcher.processes import fork_rank, run_rank

    listens = words[0] in _GOES_ON

    def start(attempt: int) -> StartRank:
        again = [*words]
        if attempt and listens and "--resume" not in words:
            again.append("--resume")
        program = main
        if program is None:
            return run_rank([sys.executable, "-m", module, *again], listens=listens)
        _import_what_ranks_need()
        return fork_rank(lambda: program(again), listens=listens)

    return start


def _import_what_ranks_need() -> None:
    """Import, so that forked ranks need not: starting them again takes tenths of a second."""
    # The last one is what deepspeed.initialize imports, in every rank.
    for name in ("deepspeed", "dist_ft.train.build", "torch._inductor.compile_fx"):
        importlib.import_module(name)


def _say(text: str) -> None:
    typer.echo(f"launch: {text}", err=True)
