"""Trackers: the events of a run in TensorBoard, Weights & Biases, MLflow or Trackio.

All of them get the same names, made from the events alone: ``train/TASK/loss``,
``validation/TASK/f1``, ``groups/drift/block.0``, ``phase/trainable_params`` and so on, by step.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_ft.train.recorder import Tracker

log = logging.getLogger("dist_ft")

# What is the same for all tasks of a step, and what names a step instead of measuring it.
_SHARED = ("lr", "tokens", "tokens_per_s", "trainable_params", "peak_rss_bytes")
_NAMES = ("event", "step", "time_s", "task", "split")
# The tracker's module, and the extra that brings it.
PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
    "trackio": ("trackio", "trackio"),
}


def numbers(event: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of an event by their names in every tracker."""
    return dict(_numbers(event))


def _numbers(event: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    kind = event["event"]
    if kind == "groups":
        for field in ("gradient_norm", "drift"):
            for name, value in event[field].items():
                yield f"groups/{field}/{name}", float(value)
        return
    if kind == "eval":
        for name, value in event["metrics"].items():
            yield f"{event['split']}/{event['task']}/{name}", float(value)
        return
    prefix = f"train/{event['task']}" if kind == "step" else kind
    for name, value in event.items():
        if name in _NAMES or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        place = "train" if kind == "step" and name in _SHARED else prefix
        yield f"{place}/{name}", float(value)


def make_trackers(
    wanted: Sequence[str] | None,
    *,
    folder: Path,
    name: str,
    recipe: Mapping[str, Any],
    goes_on: bool = False,
) -> list[Tracker]:
    """Return the trackers of a run; called on rank 0 only.

    Args:
        wanted: Their names; None for TensorBoard if it is installed.
        folder: The run's folder; everything is written below it.
        name: Of the run.
        recipe: Resolved, shown by trackers that have a place for it.
        goes_on: Whether a run goes on that has had its trackers: one whose server is away now is
            left out, and does not keep the run from going on.

    Raises:
        RuntimeError: If one that was asked for is not installed.
    """
    if wanted is None:
        wanted = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    for tracker in wanted:
        module, extra = PACKAGES[tracker]
        if importlib.util.find_spec(module) is None:
            raise RuntimeError(
                f"logging.trackers: {tracker} is not installed: pip install 'dist-ft[{extra}]', or "
                "leave it out"
            )
    makers: dict[str, Callable[..., Tracker]] = {
        "tensorboard": TensorBoard,
        "wandb": WeightsAndBiases,
        "mlflow": MlFlow,
        "trackio": Trackio,
    }
    made: list[Tracker] = []
    for tracker in wanted:
        try:
            made.append(makers[tracker](folder, name=name, recipe=recipe))
        except Exception as error:
            if not goes_on:
                raise
            kind = type(error).__name__
            log.error("%s is left out, it can't be opened: %s: %s", tracker, kind, error)
    return made


class TensorBoard:
    """Writes event files into ``RUN/tensorboard``."""

    def __init__(self, folder: Path, *, name: str, recipe: Mapping[str, Any]) -> None:
        """Open the event file of this start of the run."""
        del name, recipe
        # Not torch.utils.tensorboard, which imports seconds of what is not needed here.
        writer = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self._event = importlib.import_module("tensorboard.compat.proto.event_pb2").Event
        self._summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        self._writer = writer.EventFileWriter(str(folder / "tensorboard"))

    def event(self, event: Mapping[str, Any]) -> None:
        """Write the numbers of an event as scalars."""
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in numbers(event).items()
        ]
        if values:
            summary = self._summary(value=values)
            self._writer.add_event(
                self._event(wall_time=time.time(), step=event["step"], summary=summary)
            )

    def close(self, *, failed: bool = False) -> None:
        """Write what is buffered."""
        del failed  # its files have no place for it
        self._writer.close()


class WeightsAndBiases:
    """Weights & Biases; offline below ``RUN/wandb`` unless ``WANDB_MODE`` says otherwise."""

    def __init__(self, folder: Path, *, name: str, recipe: Mapping[str, Any]) -> None:
        """Start or go on with the run of this folder."""
        wandb = importlib.import_module("wandb")
        mode = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "dist_ft"),
            name=name,
            dir=str(folder),
            config=dict(recipe),
            mode=mode,
            settings=wandb.Settings(silent=True),
        )

    def event(self, event: Mapping[str, Any]) -> None:
        """Log the numbers of an event at its step."""
        if values := numbers(event):
            self._run.log({**values, "step": event["step"]})

    def close(self, *, failed: bool = False) -> None:
        """Finish the run."""
        self._run.finish(exit_code=int(failed))


class MlFlow:
    """MLflow; in ``RUN/mlflow.db`` unless ``MLFLOW_TRACKING_URI`` names a server."""

    def __init__(self, folder: Path, *, name: str, recipe: Mapping[str, Any]) -> None:
        """Start a run."""
        tracking = importlib.import_module("mlflow.tracking")
        where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        self._client = tracking.MlflowClient(where)
        self._entities = importlib.import_module("mlflow.entities")
        found = self._client.get_experiment_by_name("dist_ft")
        experiment = (
            found.experiment_id if found is not None else self._client.create_experiment("dist_ft")
        )
        self._run = self._client.create_run(experiment, run_name=name).info.run_id
        self._client.log_param(self._run, "model", recipe.get("model", {}).get("path", ""))

    def event(self, event: Mapping[str, Any]) -> None:
        """Log the numbers of an event at its step."""
        now = int(time.time() * 1000)
        metrics = [
            self._entities.Metric(name, value, now, event["step"])
            for name, value in numbers(event).items()
        ]
        if metrics:
            self._client.log_batch(self._run, metrics=metrics)

    def close(self, *, failed: bool = False) -> None:
        """End the run."""
        self._client.set_terminated(self._run, status="FAILED" if failed else "FINISHED")


class Trackio:
    """Trackio, local-first; where ``TRACKIO_DIR`` says."""

    def __init__(self, folder: Path, *, name: str, recipe: Mapping[str, Any]) -> None:
        """Start a run."""
        os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))
        self._trackio = importlib.import_module("trackio")
        self._trackio.init(project="dist_ft", name=name, config=dict(recipe))

    def event(self, event: Mapping[str, Any]) -> None:
        """Log the numbers of an event at its step."""
        if values := numbers(event):
            self._trackio.log(values, step=event["step"])

    def close(self, *, failed: bool = False) -> None:
        """Finish the run."""
        del failed  # it knows no other end
        self._trackio.finish()
