"""What a person reads on a terminal or in a file of it: nothing is cut, however narrow it is."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

_ANY_WIDTH = 10_000


def make_console() -> Console:
    """Return a console for results; into a pipe, sentences go on one line each."""
    console = Console(highlight=False)
    console.soft_wrap = not console.is_terminal
    return console


def print_table(console: Console, table: Table) -> None:
    """Print a table whose words and figures stay whole.

    Cells wrap between words. Where that does not suffice, lines are longer than the console.
    """
    least = Measurement.get(console, console.options.update(max_width=_ANY_WIDTH), table).minimum
    width = console.width
    console.width = max(width, least)
    console.print(table, soft_wrap=False)
    console.width = width


class ProgressAbove(Progress):
    """A bar, and below it its task's field ``text``, which wraps instead of being cut."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the bar and the text."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(f"  {task.fields['text']}")
