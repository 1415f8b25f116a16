"""What a Python program adds to a recipe: tasks, a freezing policy and regularizers of its own."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dist_ft.freezing.policies import FreezePolicy
from dist_ft.freezing.schedule import LayerOrder
from dist_ft.tasks import build_task
from dist_ft.tasks.base import Task
from dist_ft.tasks.output_regularization import OutputPenalty

MakeTask = Callable[..., Task]
MakePolicy = Callable[[LayerOrder, int], FreezePolicy]


@dataclass(frozen=True)
class Extensions:
    """Parts that a program brings; the recipe describes everything else.

    Attributes:
        tasks: By the name of the task: called with the settings of the recipe's task as keywords,
            usually a subclass of a task of ``dist_ft.tasks``.
        policy: Called with the layer groups and the number of steps.
        regularizers: By the name of the task: called with the choices of each training forward.
    """

    tasks: Mapping[str, MakeTask] = field(default_factory=dict)
    policy: MakePolicy | None = None
    regularizers: Mapping[str, OutputPenalty] = field(default_factory=dict)

    def check(self, names: list[str]) -> None:
        """Check that every task is one of the recipe's.

        Raises:
            ValueError: If one is not.
        """
        for argument, given in (("tasks", self.tasks), ("regularizers", self.regularizers)):
            unknown = sorted(set(given) - set(names))
            if unknown:
                raise ValueError(
                    f"{argument}: the recipe has no task {', '.join(unknown)}; its tasks are "
                    f"{', '.join(names)}: use one of their names"
                )

    def make_task(self, settings: Mapping[str, Any]) -> Task:
        """Return the task of a recipe's settings, the program's own if it has one."""
        own = self.tasks.get(settings["name"])
        if own is None:
            return build_task(settings)
        return own(**{key: value for key, value in settings.items() if key != "type"})

    def implementation(self, task: str) -> dict[str, str]:
        """Return what tells a program's task from others, so that prepared data is not mixed up."""
        own = self.tasks.get(task)
        if own is None:
            return {}
        try:
            source = inspect.getsource(own)
        except (OSError, TypeError):  # defined in a console: there is no file to read
            source = ""
        digest = hashlib.sha256(source.encode()).hexdigest()[:16]
        return {"implementation": f"{own.__module__}.{own.__qualname__}/{digest}"}


NO_EXTENSIONS = Extensions()
