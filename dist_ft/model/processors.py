"""What takes the place of a tokenizer where the input is no text."""

from __future__ import annotations

from typing import Any

import transformers

from dist_ft.model.backbone import ModelSource, readable_errors
from dist_ft.model.sources import resolve_model_path

_LOADERS = {"images": "AutoImageProcessor", "audio": "AutoFeatureExtractor"}


def load_processor(source: ModelSource, *, takes: str) -> Any:
    """Returns what makes a model's inputs of images or of audio.

    Args:
        source: the model.
        takes: ``images``, for the image processor, or ``audio``, for the feature extractor.

    Raises:
        ValueError: there is none, or it does not say what a task needs.
    """
    with readable_errors(source):
        processor: Any = getattr(transformers, _LOADERS[takes]).from_pretrained(
            resolve_model_path(source.path),
            revision=source.revision or "main",
            trust_remote_code=source.trust_remote_code,
        )
    if takes == "images":
        _check_image_processor(processor, path=source.path)
    return processor


def _check_image_processor(processor: Any, *, path: str) -> None:
    size = dict(processor.size or {})
    if not {"height", "width"} <= size.keys() or not processor.image_mean:
        raise ValueError(
            f"model.path: the image processor of {path} has size {size}, but height, width, "
            "image_mean and image_std are needed: use a model that takes images of one size"
        )
