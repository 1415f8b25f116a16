"""Image classification: one label for an image, which shards hold as uint8."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

import dist_ft.tasks.metrics as metrics
from dist_ft.data.collate import ArrayInput, CollateSpec
from dist_ft.data.loader import MicroBatch
from dist_ft.tasks.base import (
    Choice,
    LossSum,
    NoGeneration,
    Record,
    RecordMetrics,
    Row,
    choose_metric,
)
from dist_ft.tasks.labels import (
    check_labels,
    discover_labels,
    known_labels,
    label_config,
    label_index,
    label_name,
)

_METRICS = {"accuracy": True, "macro_f1": True, "mcc": True}
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ImageClassification(NoGeneration):
    """The task type ``image_classification``; an image processor takes the tokenizer's place.

    Attributes:
        name: name in the recipe.
        image: column of the image: a path, encoded bytes (alone or as hub data sets hold them,
            under ``bytes``), or nested lists of numbers from 0 to 255, rows first.
        label: column of the label.
        labels: label names in the order of their indices; found by ``scan`` if not given.
        metric: primary metric.
    """

    name: str
    image: str = "image"
    label: str = "label"
    labels: Sequence[str] | None = None
    metric: str | None = None

    type = "image_classification"
    auto_class = "AutoModelForImageClassification"

    def __post_init__(self) -> None:
        check_labels(self.labels, task=self.name)
        _ = self.primary_metric

    @property
    def required_columns(self) -> tuple[str, ...]:
        """Columns of the raw rows that must have a value."""
        return (self.image, self.label)

    @property
    def primary_metric(self) -> tuple[str, bool]:
        """Name of the metric that decides, and whether more is better."""
        return choose_metric(self.metric, task=self.name, known=_METRICS)

    @property
    def needs_scan(self) -> bool:
        """Whether the labels must be found in the training rows."""
        return self.labels is None

    def scan(self, rows: Iterable[Row]) -> dict[str, Any]:
        """Returns the labels of the training rows under ``labels``."""
        names = (label_name(row.get(self.label)) for row in rows)
        return {"labels": discover_labels(names, task=self.name)}

    def with_state(self, state: Mapping[str, Any]) -> Self:
        """Returns the task with the labels that ``scan`` found."""
        return replace(self, labels=tuple(state["labels"])) if state else self

    def config_updates(self) -> dict[str, Any]:
        """Returns the configuration values of the head."""
        return label_config(known_labels(self.labels, task=self.name))

    def schema(self) -> pa.Schema:
        """Returns the task's columns, without the base columns."""
        return pa.schema([pa.field("pixels", pa.list_(pa.uint8())), pa.field("labels", pa.int32())])

    def split_key(self, row: Row) -> str:
        """Returns the image: its copies stay on one side."""
        return repr(row.get(self.image))

    def dedupe_key(self, row: Row) -> str:
        """Returns image and label."""
        return f"{self.split_key(row)}\x1f{label_name(row.get(self.label))}"

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Checks that what came with the model is an image processor.

        Raises:
            ValueError: it is not.
        """
        if not hasattr(tokenizer, "image_mean"):
            raise ValueError(
                f"tasks.{self.name}: image classification needs a model with an image processor, "
                f"got {type(tokenizer).__name__}: use another model.path"
            )

    def encode(self, rows: list[Row], *, tokenizer: Any) -> list[Row]:
        """Returns one feature per raw row: the resized image, and a position for every patch.

        Raises:
            ValueError: an image cannot be read, or a label is not known.
        """
        self.check_tokenizer(tokenizer)
        labels = known_labels(self.labels, task=self.name)
        size = (tokenizer.size["height"], tokenizer.size["width"])
        return [
            {
                # An image has no tokens; one stands for it, as all images cost the same.
                "input_ids": [0],
                "pixels": _read(row.get(self.image), size=size).reshape(-1),
                "labels": label_index(row.get(self.label), labels=labels, task=self.name),
                "loss_count": 1,
                "source_row": row["source_row"],
                "truncated_tokens": 0,
            }
            for row in rows
        ]

    def collate_spec(self, tokenizer: Any, *, evaluation: bool) -> CollateSpec:
        """Returns the columns of a micro-batch; pixels are normalised when they are collated."""
        del evaluation
        return CollateSpec(
            ragged={},
            scalar=("labels",),
            inputs=("pixel_values",),
            targets=("labels",),
            arrays={
                "pixel_values": ArrayInput(
                    "pixels",
                    shape=(3, tokenizer.size["height"], tokenizer.size["width"]),
                    scale=float(tokenizer.rescale_factor),
                    mean=tuple(tokenizer.image_mean),
                    std=tuple(tokenizer.image_std),
                )
            },
        )

    def loss(self, outputs: Any, targets: Mapping[str, Tensor]) -> LossSum:
        """Returns the summed cross-entropy, computed in float32.

        Args:
            outputs: ``logits`` [rows, labels].
            targets: ``labels``: int64 [rows].
        """
        labels = targets["labels"]
        losses = torch.nn.functional.cross_entropy(
            outputs["logits"].float(), labels, reduction="none"
        )
        return LossSum(losses.sum(), torch.tensor(len(labels), device=labels.device))

    def choices(self, outputs: Any, targets: Mapping[str, Tensor]) -> list[Choice]:
        """Returns the choices that the loss scores."""
        return [Choice(outputs["logits"], targets["labels"])]

    def new_metrics(self) -> RecordMetrics:
        """Returns empty metrics."""
        return RecordMetrics(decode=_decode, score=metrics.single_label_scores)


def _decode(outputs: Any, batch: MicroBatch, texts: Sequence[str] | None) -> list[Record]:
    del texts
    pairs = zip(
        outputs["logits"].float().argmax(1).tolist(), batch.targets["labels"].tolist(), strict=True
    )
    return [{"prediction": left, "label": right} for left, right in pairs]


def _read(value: Any, *, size: tuple[int, int]) -> Pixels:
    """Returns an image as uint8 [3, height, width].

    Raises:
        ValueError: it cannot be read.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise RuntimeError(
            "images are read by the package pillow, which is not installed: "
            "pip install 'dist-ft[image]'"
        ) from error
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    try:
        if isinstance(value, str):
            image = Image.open(Path(value))
        elif isinstance(value, bytes):
            image = Image.open(io.BytesIO(value))
        else:
            image = Image.fromarray(_as_uint8(value))
        resized = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BILINEAR)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"an image cannot be read: {error}") from error
    return np.asarray(resized, dtype=np.uint8).transpose(2, 0, 1)


def _as_uint8(value: Any) -> Pixels:
    pixels = np.asarray(value)
    if pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError("numbers of an image must be whole and from 0 to 255")
    return pixels.astype(np.uint8)
