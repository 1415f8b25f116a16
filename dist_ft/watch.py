"""A run in the terminal while it trains; reads nothing but its ``metrics.jsonl``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dist_ft.train.recorder import ending, surviving
from dist_ft.train.signals import stop_name

Event = dict[str, Any]
_BARS = "▁▂▃▄▅▆▇█"
_SPARK = 32
_FAULTS = (
    "failure", "bad_numbers", "roll_back", "checkpoint_failed", "out_of_memory", "straggler",
)  # fmt: skip
_NEWS = ("phase", "eval", "checkpoint", "resume", "stop", "end", *_FAULTS)
_LATEST = 6
_LONG_SILENCE_S = 120.0


@dataclass
class Follower:
    """Reads a growing record; each call takes what was added since the last.

    Attributes:
        path: The run's ``metrics.jsonl``.
        events: All whole events so far, also those that a crash undid.
    """

    path: Path
    events: list[Event] = field(default_factory=list)
    _offset: int = 0

    def silent_s(self) -> float:
        """Return the seconds since the file has changed."""
        return max(0.0, time.time() - self.path.stat().st_mtime) if self.path.exists() else 0.0

    def refresh(self) -> list[Event]:
        """Return the events of the run as it is now."""
        if self.path.is_file():
            with self.path.open("rb") as file:
                file.seek(self._offset)
                added = file.read()
            whole = added[: added.rfind(b"\n") + 1]
            self._offset += len(whole)
            for line in whole.splitlines():
                try:
                    event = json.loads(line)
                except json.JSONDecodeError:
                    continue  # a line that a killed process left unfinished
                if isinstance(event, dict):
                    self.events.append(event)
        return surviving(self.events)


def watch(run: Path, *, once: bool = False, interval_s: float = 1.0) -> None:
    """Show a run until it ends or the user stops.

    Args:
        run: Its folder.
        once: Print it as it is now and return.
        interval_s: Seconds between looks at the record.

    Raises:
        ValueError: If the folder is not that of a run.
    """
    if not (run / "recipe.json").is_file():
        raise ValueError(f"{run} holds no run (no recipe.json): name a folder that train has made")
    follower, console = Follower(run / "metrics.jsonl"), Console()
    if once or not console.is_terminal:
        events = follower.refresh()
        shown = dashboard(
            run.name, events, everything=follower.events, silent_s=follower.silent_s()
        )
        console.print(shown)
        return
    events = follower.refresh()
    first = dashboard(run.name, events, everything=follower.events)
    with Live(first, console=console, auto_refresh=False) as live:
        try:
            while ending(events) is None:
                time.sleep(interval_s)
                events = follower.refresh()
                shown = dashboard(
                    run.name, events, everything=follower.events, silent_s=follower.silent_s()
                )
                live.update(shown, refresh=True)
        except KeyboardInterrupt:
            return


def dashboard(
    name: str,
    events: Sequence[Event],
    *,
    everything: Sequence[Event] = (),
    silent_s: float = 0.0,
) -> RenderableType:
    """Return what is shown of a run.

    Args:
        name: Of the run.
        events: All so far of the run as it is now.
        everything: All so far, also those that a crash undid.
        silent_s: Seconds since the last one.
    """
    if not events:
        return Text(f"{name}: no event yet")
    counts = set(map(id, events))
    # What went wrong is told though a resume has undone the steps around it.
    news = [e for e in everything if id(e) in counts or e["event"] in _FAULTS]
    return Group(
        _head(name, events, silent_s=silent_s),
        _tasks(events),
        _numbers(events),
        _groups(events),
        _news(news or events),
    )


def _of(events: Sequence[Event], kind: str) -> list[Event]:
    return [event for event in events if event["event"] == kind]


def _head(name: str, events: Sequence[Event], *, silent_s: float) -> RenderableType:
    step = max(event["step"] for event in events)
    starts = _of(events, "start")
    total = starts[-1]["total_steps"] if starts else None
    last = ending(events)
    state = "training"
    if last is not None:
        state = "finished" if last["event"] == "end" else "stopped, can be resumed"
    line = Table.grid(padding=(0, 2))
    cells: list[RenderableType] = [Text(name, style="bold"), state]
    if total:
        cells.append(ProgressBar(total=total, completed=step, width=40))
        cells.append(f"{step:,} of {total:,} steps")
        if last is None and (left := _left_s(events, step=step, total=total)) is not None:
            cells.append(f"{_time(left)} left")
    else:
        cells.append(f"step {step:,}")
    line.add_row(*cells)
    if last is not None or silent_s < _LONG_SILENCE_S:
        return line
    # Killed runs say nothing any more; neither do some that evaluate or save for long.
    note = f"no event for {_time(silent_s)}: is it alive? logs/rank0.log says more"
    return Group(line, Text(note, style="yellow"))


def _left_s(events: Sequence[Event], *, step: int, total: int) -> float | None:
    """Seconds to the end at the pace since the last start, evaluations included."""
    start = _of(events, "start")[-1]
    done, took = step - start["step"], events[-1]["time_s"] - start["time_s"]
    return took / done * (total - step) if done > 0 and took > 0 else None


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _tasks(events: Sequence[Event]) -> Table:
    table = Table("task", "loss", f"last {_SPARK} intervals", "latest scores", box=None)
    steps = _of(events, "step")
    scores = {event["task"]: event for event in _of(events, "eval")}
    for task in dict.fromkeys([e["task"] for e in steps] + list(scores)):
        losses = [e["loss"] for e in steps if e["task"] == task]
        score = scores.get(task)
        shown = f"step {score['step']}: {_metrics(score['metrics'])}" if score else ""
        loss = f"{losses[-1]:.4f}" if losses else ""
        table.add_row(Text(task), loss, sparkline(losses), Text(shown))
    return table


def _metrics(metrics: dict[str, float]) -> str:
    shown = [(k, v) for k, v in metrics.items() if not k.startswith("baseline")][:4]
    return ", ".join(f"{name} {value:.3f}" for name, value in shown)


def _numbers(events: Sequence[Event]) -> Table:
    table = Table.grid(padding=(0, 2))
    steps = _of(events, "step")
    if not steps:
        return table
    last = steps[-1]
    speeds = [e["tokens_per_s"] for e in steps]
    norm = last.get("grad_norm")
    table.add_row("tokens/s", f"{last['tokens_per_s']:,.0f}", sparkline(speeds))
    norms = [e["grad_norm"] for e in steps if e.get("grad_norm") is not None]
    table.add_row("gradient norm", "" if norm is None else f"{norm:.3g}", sparkline(norms))
    table.add_row("learning rate", f"{last['lr']:.3g}", sparkline([e["lr"] for e in steps]))
    table.add_row("peak memory", f"{last['peak_rss_bytes'] / 2**30:.2f} GiB", "of rank 0")
    return table


def _groups(events: Sequence[Event]) -> Text:
    phases = _of(events, "phase")
    if not phases:
        return Text()
    phase, names = phases[-1], _names(events)
    trains = set(phase["trainable_groups"])
    text = Text(f"phase {phase['phase']}, {phase['trainable_params']:,} parameters train: ")
    for name in names or phase["trainable_groups"]:
        on = name in trains
        text.append("■" if on else "□", style="green" if on else "dim")
    return text.append(f"  ({len(trains)} of {len(names) or '?'} layer groups, bottom to top)")


def _names(events: Sequence[Event]) -> list[str]:
    starts = _of(events, "start")
    return list(starts[-1].get("layer_groups", ())) if starts else []


def _news(events: Sequence[Event]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for event in [e for e in events if e["event"] in _NEWS][-_LATEST:]:
        style = "yellow" if event["event"] in _FAULTS else ""
        text = Text(_says(event), style=style, overflow="ellipsis", no_wrap=bool(style))
        table.add_row(f"step {event['step']:,}", Text(event["event"], style=style), text)
    return table


def _says(event: Event) -> str:
    says: dict[str, Callable[[Event], str]] = {
        "phase": lambda e: f"{e['phase']}: {len(e['trainable_groups'])} groups, {e['switch']}",
        "eval": lambda e: f"{e['task']} {e['split']}: {_metrics(e['metrics'])}",
        "checkpoint": lambda e: f"{e['path']}, {e['bytes'] / 2**20:,.0f} MiB in {e['save_s']} s",
        "resume": lambda e: f"from {e.get('path') or 'the beginning'}",
        "stop": lambda e: stop_name(e.get("signal")),
    }
    if event["event"] in says:
        return says[event["event"]](event)
    hidden = {"event", "step", "time_s"}
    return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in event.items() if k not in hidden)


def sparkline(values: Sequence[float]) -> str:
    """Return the last values as a row of small bars, from their least to their largest."""
    tail = list(values)[-_SPARK:]
    if not tail:
        return ""
    low, span = min(tail), max(tail) - min(tail)
    top = len(_BARS) - 1
    return "".join(_BARS[round((v - low) / span * top) if span else 0] for v in tail)
