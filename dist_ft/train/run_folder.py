"""The folder of a run: where its files are and what they say about how it was started."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_ft.data.manifest import write_durably

if TYPE_CHECKING:
    from dist_ft import dist


# What may change when a run goes on: how it is computed and watched, not what is computed.
FREE_ON_RESUME = {
    "name",
    "output_dir",
    "data_dir",
    "data_processes",
    "engine",
    "evaluation",
    "checkpoint",
    "kernels",
    "logging",
    "supervision",
    "train.on_bad_numbers",
    "train.micro_batch_size",
    "train.micro_batch_tokens",
}


def scores_decide(recipe: Mapping[str, Any]) -> bool:
    """Return whether scores on validation decide what trains, layer groups or tasks."""
    mixture = recipe.get("mixture") or {}
    return recipe["freezing"]["policy"] == "plateau" or mixture.get("reward") == "gain"


@dataclass(frozen=True)
class RunFolder:
    """Paths inside ``runs/<name>``."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.root / "recipe.json"

    @property
    def metrics(self) -> Path:
        """The events of the run."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints."""
        return self.root / "checkpoints"

    @property
    def export(self) -> Path:
        """The exported tasks."""
        return self.root / "export"

    def read_recipe(self) -> dict[str, Any]:
        """Return the resolved recipe of the run.

        Raises:
            ValueError: If the folder holds no run.
        """
        if not self.recipe.is_file():
            raise ValueError(
                f"{self.root} holds no run (no {self.recipe.name}): give a run's folder"
            )
        return json.loads(self.recipe.read_text())

    def start(self, recipe: Mapping[str, Any], *, resume: bool) -> None:
        """Make the folder, or check that the run in it may go on with `recipe`.

        Raises:
            ValueError: If a run is there and is not to be resumed, or its recipe differs in what
                is computed.
        """
        self.check(recipe, resume=resume)
        if not self.recipe.is_file():
            self.root.mkdir(parents=True, exist_ok=True)
            self.write_json(self.recipe.name, recipe)

    def goes_on(self, recipe: Mapping[str, Any]) -> None:
        """Keep the recipe that nothing refuses any more.

        What may change at a resume, such as how scores decide, holds from then on for whoever
        reads the folder, too.
        """
        self.write_json(self.recipe.name, recipe)

    def check(self, recipe: Mapping[str, Any], *, resume: bool) -> None:
        """Check that a run with `recipe` may be started or go on here.

        Raises:
            ValueError: As `start` does.
        """
        if not self.recipe.is_file():
            return
        if not resume:
            raise ValueError(
                f"name: {self.root} holds a run already: go on with it by --resume, or choose "
                "another name"
            )
        changed = sorted(_differences(self.read_recipe(), recipe, free=self.free_on_resume(recipe)))
        if changed:
            raise ValueError(
                f"{self.root} was started with another recipe; what differs: {', '.join(changed)}."
                " Resume with the recipe that it was started with, or choose another name"
            )

    def free_on_resume(self, recipe: Mapping[str, Any]) -> set[str]:
        """Return the keys of `recipe` that may change when what is in the folder goes on."""
        free = set(FREE_ON_RESUME)
        if scores_decide(recipe):
            free.discard("evaluation")
        return free

    def write_json(self, name: str, body: Mapping[str, Any]) -> None:
        """Write a JSON file into the folder, whole or not at all: any moment may be the last."""
        content, path = json.dumps(body, indent=1, default=str) + "\n", self.root / name
        if not path.is_file() or path.read_bytes() != content.encode():
            write_durably(path, content=content)

    def add_to_environment(self, more: Mapping[str, Any]) -> None:
        """Add keys to ``env.json``; without one, as when a run is only measured, do nothing."""
        file = self.root / "env.json"
        if file.is_file():
            self.write_json(file.name, {**json.loads(file.read_text()), **more})

    @contextmanager
    def logging_to_file(self, world: dist.World) -> Iterator[None]:
        """Send this rank's log to ``logs/rank<N>.log`` inside the context."""
        folder = self.root / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(folder / f"rank{world.rank}.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger = logging.getLogger("dist_ft")
        level, propagates = logger.level, logger.propagate
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(handler)
            handler.close()
            logger.setLevel(level)
            logger.propagate = propagates


def _differences(old: Any, new: Any, *, free: Collection[str], path: str = "") -> list[str]:
    if path in free:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            difference
            for key in sorted(old.keys() | new.keys())
            for difference in _differences(
                old.get(key), new.get(key), free=free, path=f"{path}.{key}" if path else key
            )
        ]
    return [] if old == new else [f"{path} (was {old!r}, is {new!r})"]
