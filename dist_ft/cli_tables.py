"""Tables that commands print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def print_metrics(metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Print the metrics of each task and split as a table."""
    from rich.table import Table

    from dist_ft.tables import make_console, print_table

    table = Table("task", "split", "metric", "value")
    for task, splits in metrics.items():
        for split, values in splits.items():
            for name, value in values.items():
                shown = f"{value:.4f}" if isinstance(value, float) else str(value)
                table.add_row(task, split, name, shown)
    print_table(make_console(), table)


def print_differences(
    differences: Mapping[str, Mapping[str, tuple[float, float, float]]],
) -> None:
    """Print how much larger each metric is, with its 95 % interval."""
    from rich.table import Table

    from dist_ft.tables import make_console, print_table

    table = Table("task", "metric", "difference", "95 % interval")
    for task, metrics in differences.items():
        for name, (value, low, high) in metrics.items():
            table.add_row(task, name, f"{value:+.4f}", f"{low:+.4f} to {high:+.4f}")
    print_table(make_console(), table)
