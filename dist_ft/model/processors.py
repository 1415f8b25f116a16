"""What takes the place of a tokenizer where the input is no text."""

from __future__ import annotations

from typing import Any

import transformers

from dist_ft.model.backbone import ModelSource, readable_errors
from dist_ft.model.sources import resolve_model_path


def load_image_processor(source: ModelSource) -> Any:
    """Returns the image processor of a model, which knows its size and normalisation.

    Raises:
        ValueError: there is none, or it does not say what a task needs.
    """
    with readable_errors(source):
        processor: Any = transformers.AutoImageProcessor.from_pretrained(
            resolve_model_path(source.path),
            revision=source.revision or "main",
            trust_remote_code=source.trust_remote_code,
        )
    size = dict(processor.size or {})
    if not {"height", "width"} <= size.keys() or not processor.image_mean:
        raise ValueError(
            f"model.path: the image processor of {source.path} has size {size}, but height, width, "
            "image_mean and image_std are needed: use a model that takes images of one size"
        )
    return processor
