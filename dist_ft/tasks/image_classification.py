"""Image classification: one label for an image, which shards hold as uint8."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dist_ft.data.collate import ArrayInput, CollateSpec
from dist_ft.tasks.base import NoGeneration, Row
from dist_ft.tasks.single_label import SingleLabel

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ImageClassification(SingleLabel, NoGeneration):
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

    @property
    def content(self) -> str:
        """Column of the image."""
        return self.image

    def schema(self) -> pa.Schema:
        """Returns the task's columns, without the base columns."""
        return pa.schema([pa.field("pixels", pa.list_(pa.uint8())), pa.field("labels", pa.int32())])

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
        size = (tokenizer.size["height"], tokenizer.size["width"])
        return [
            {
                # An image has no tokens; one stands for it, as all images cost the same.
                "input_ids": [0],
                "pixels": _read(row.get(self.image), size=size).reshape(-1),
                "labels": self._label_index(row),
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
