"""What every search does around its runs: ranks meet, and a signal stops it after saving."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dist_ft import dist
from dist_ft.config import Recipe
from dist_ft.heartbeat import Heartbeat, noting_errors
from dist_ft.recipe.evaluation_checks import check_ranking
from dist_ft.recipe.ranks import check_ranks
from dist_ft.search.candidates import Outcome
from dist_ft.search.study import import_optuna
from dist_ft.train.console import Console
from dist_ft.train.ending import PREEMPTED
from dist_ft.train.segment import Place, PreemptedError
from dist_ft.train.signals import StopRequest

T = TypeVar("T")


def run_session(
    recipe: Recipe,
    *,
    look: Callable[[Console], T],
    search: Callable[[T, Place, Console], Outcome],
) -> Outcome:
    """Return what `search` returns; every rank calls this.

    Args:
        recipe: What the candidates have in common.
        look: Returns what the search must know first; no process group is up yet, so that what is
            wrong ends every rank alike.
        search: Searches, given what `look` returned, and where.

    Raises:
        ValueError: If recipe and ranks do not fit, or its runs can't be ranked by one score.
        RuntimeError: If Optuna is not installed.
    """
    check_ranking(recipe)
    import_optuna()  # on every rank, so that all of them end if it is missing
    stop, heartbeat = StopRequest(), Heartbeat.of_this_rank()
    with stop.listening():
        world = dist.world_from_environment()
        check_ranks(recipe, world.world_size)
        console = Console(main=world.is_main)
        seen = look(console)
        group = dist.process_group(
            world,
            timeout_s=recipe.engine.collective_timeout_s,
            join_timeout_s=recipe.engine.join_timeout_s,
        )
        with group as device, noting_errors():
            place = Place(world, device, lambda: stop.signal, heartbeat)
            place.between_runs()
            try:
                return search(seen, place, console)
            except PreemptedError:
                console.say("stopped after saving; start the same command with --resume to go on")
        return Outcome(PREEMPTED)
