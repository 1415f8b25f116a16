"""dist_ft from Python: what the commands do, in a few lines of a program or a notebook."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dist_ft.config import Recipe
from dist_ft.recipe import load_recipe

if TYPE_CHECKING:
    from dist_ft.planning.settings import Plan
    from dist_ft.tasks.output_regularization import OutputPenalty
    from dist_ft.train.extensions import Extensions, MakePolicy, MakeTask


class Stopped(SystemExit):
    """Training was asked to stop by a signal, and has saved; ends the program if nobody catches it.

    What comes after `fine_tune` in a program must not take the run for finished, and whoever starts
    the program again looks at its exit code, 75.

    Attributes:
        run: The run's handle; `fine_tune` with ``resume=True`` goes on with it.
    """

    def __init__(self, code: int, run: RunHandle) -> None:
        """Keep the exit code and the handle."""
        super().__init__(code)
        self.run = run


@dataclass(frozen=True)
class RunHandle:
    """A run in its folder, and what can be done with it, by one process.

    Attributes:
        path: The run's folder.
        extensions: The program's own tasks and policy, with which it was trained.
    """

    path: Path
    extensions: Extensions

    @property
    def is_main(self) -> bool:
        """Whether this process is rank 0, or the only one: the one that goes on with the run."""
        return os.environ.get("RANK", "0") == "0"

    @property
    def outcome(self) -> str:
        """How the run ended, in words: ``finished`` if it came to its last step."""
        from dist_ft.report.record import read_run

        return read_run(self.path).outcome

    def scores(self, *, split: str = "validation") -> dict[str, dict[str, float]]:
        """Return the latest recorded metrics of each task."""
        from dist_ft.report.record import read_run

        latest = read_run(self.path).latest()
        return {e["task"]: e["metrics"] for e in latest if e["split"] == split}

    def evaluate(self) -> dict[str, dict[str, dict[str, float]]]:
        """Score validation and test splits with the latest weights; return them by task, split."""
        from dist_ft.train import finished

        with self._by_one("evaluate"):
            return finished.evaluate(self.path, extensions=self.extensions)

    def export(
        self,
        *,
        task: str | None = None,
        best: bool = False,
        lora: Literal["merged", "adapter"] = "merged",
        replace: bool = False,
    ) -> list[Path]:
        """Write a plain transformers folder for each task (or one); return the folders.

        Args:
            task: Only this one.
            best: Each task's weights at its best evaluation instead of the newest ones.
            lora: Adapters added to the weights, or alone, for peft.
            replace: Let an earlier export give way to this one.
        """
        from dist_ft.train import finished

        how = finished.ExportOptions(best=best, lora=lora, replace=replace)
        with self._by_one("export"):
            return finished.export(self.path, task=task, how=how, extensions=self.extensions)

    def report(self, *, beside: Sequence[Path] = ()) -> Path:
        """Write the HTML page, compared with the runs `beside` it; return its path."""
        from dist_ft.report import write_report

        with self._by_one("report"):
            return write_report([self.path, *beside])

    @contextmanager
    def _by_one(self, what: str) -> Iterator[None]:
        from dist_ft import dist

        if not self.is_main:
            raise RuntimeError(
                f"{what}: rank {os.environ['RANK']} would write what rank 0 writes: call it where "
                "run.is_main is true"
            )
        with dist.alone():  # the program may have a process group of its own
            yield


def fine_tune(
    recipe: str | Path | Recipe,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    tasks: Mapping[str, MakeTask] | None = None,
    policy: MakePolicy | None = None,
    regularizers: Mapping[str, OutputPenalty] | None = None,
) -> RunHandle:
    """Train on this process, or on all ranks when torchrun starts the program.

    Args:
        recipe: A file, the name of a packaged recipe, or a loaded recipe.
        overrides: ``dotted.path=value`` each.
        resume: Go on from the newest whole checkpoint, if there is one.
        tasks: Own tasks in the place of the recipe's, by name: called with the settings of the
            recipe's task as keywords.
        policy: Own freezing policy: called with the layer groups and the number of steps.
        regularizers: What is added to the training loss of tasks, by name: called with the choices
            (logits and right classes) of each forward, returns a sum over them, fp32 scalar.
            Evaluation keeps the task's loss.

    Raises:
        ValueError: If the recipe is wrong, or does not fit the model, the data or the ranks.
        Stopped: If a signal has stopped the run (SIGINT, SIGTERM, SIGUSR1, SIGHUP); it is saved.
    """
    from dist_ft.train import build, ending
    from dist_ft.train.extensions import Extensions

    loaded = _load(recipe, overrides)
    extensions = Extensions(dict(tasks or {}), policy, dict(regularizers or {}))
    code = build.train(loaded, resume=resume, extensions=extensions)
    run = RunHandle(loaded.output_dir / loaded.name, extensions)
    if code != ending.DONE:
        raise Stopped(code, run)
    return run


def open_run(
    path: str | Path,
    *,
    tasks: Mapping[str, MakeTask] | None = None,
    policy: MakePolicy | None = None,
) -> RunHandle:
    """Return the handle of a run that is there already.

    Args:
        path: Its folder.
        tasks: The own tasks that it was trained with.
        policy: The own policy that it was trained with.

    Raises:
        ValueError: If the folder holds no run.
    """
    from dist_ft.train.extensions import Extensions

    if not (Path(path) / "recipe.json").is_file():
        raise ValueError(f"{path} holds no run (no recipe.json): name a folder that train has made")
    return RunHandle(Path(path), Extensions(tasks=dict(tasks or {}), policy=policy))


def plan(
    recipe: str | Path | Recipe,
    *,
    overrides: Sequence[str] = (),
    nodes: int = 1,
    gpus: int = 1,
    gpu: str = "h100-80g",
) -> Plan:
    """Return what a run will need on so many accelerators, phase by phase.

    Raises:
        ValueError: If the recipe is wrong, or the model's configuration can't be read.
    """
    from dist_ft.planning.run import PlanRequest, plan_recipe

    loaded = _load(recipe, overrides, needs_files=False)
    return plan_recipe(loaded, PlanRequest(nodes, gpus, gpu)).plan


def _load(
    recipe: str | Path | Recipe, overrides: Sequence[str], *, needs_files: bool = True
) -> Recipe:
    if isinstance(recipe, Recipe):
        if overrides:
            raise ValueError(
                "overrides: a loaded recipe can't be changed: give them to load_recipe"
            )
        return recipe
    return load_recipe(recipe, overrides=overrides, needs_files=needs_files)
