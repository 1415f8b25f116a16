"""The recipe's tasks: one class for each type."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dist_ft.config_base import Positive, Section, TaskName
from dist_ft.config_data import DataConfig, TransformConfig


class TaskBase(Section):
    """What every task has."""

    takes: ClassVar[str] = "text"
    name: TaskName
    data: DataConfig
    max_length: Positive = 128
    on_error: Literal["stop", "skip"] = "stop"
    augmentation: list[TransformConfig] = Field(default_factory=list)
    segmentation: Literal["characters", "jieba"] = "characters"

    def arguments(self) -> dict[str, Any]:
        """Return what the task itself is made of, without its data and what is done to them."""
        return self.model_dump(exclude={"data", "on_error", "augmentation", "segmentation"})


class TextClassificationConfig(TaskBase):
    """Single-label, multi-label or regression on a text or a pair of texts."""

    type: Literal["text_classification"]
    problem: Literal["single_label", "multi_label", "regression"] = "single_label"
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    labels: list[str] | None = None
    metric: str | None = None


class TokenClassificationConfig(TaskBase):
    """Labels for words; BIO tags give entity-level scores."""

    type: Literal["token_classification"]
    tokens: str = "tokens"
    tags: str = "tags"
    labels: list[str] | None = None
    metric: str | None = None


class QuestionAnsweringConfig(TaskBase):
    """Extractive question answering with windows over long contexts."""

    type: Literal["question_answering"]
    question: str = "question"
    context: str = "context"
    answers: str = "answers"
    id: str = "id"
    max_length: Positive = 384
    doc_stride: Positive = 128
    max_answer_length: Positive = 30
    metric: str | None = None

    @model_validator(mode="after")
    def _stride_fits(self) -> Self:
        if self.doc_stride >= self.max_length:
            raise ValueError(
                f"doc_stride must be smaller than max_length ({self.max_length}), got "
                f"{self.doc_stride}: lower doc_stride or raise max_length"
            )
        return self


class GenerationConfig(TaskBase):
    """Causal (prompt masked) or sequence-to-sequence generation."""

    type: Literal["generation"]
    style: Literal["causal", "seq2seq"] = "causal"
    prompt: str = "prompt"
    context: str | None = None
    response: str = "response"
    separator: str = "\n"
    chat: bool = False
    messages: str | None = None
    max_target_length: Positive = 64
    max_new_tokens: Annotated[int, Field(ge=0)] = 0
    metric: str | None = None


class ImageClassificationConfig(TaskBase):
    """Single-label classification of images of one size."""

    takes = "images"
    type: Literal["image_classification"]
    image: str = "image"
    label: str = "label"
    labels: list[str] | None = None
    metric: str | None = None
    # All images have the size of the model's; see `recipe.task_checks`.
    max_length: Positive = Field(128, exclude=True)


class AudioClassificationConfig(TaskBase):
    """Single-label classification of clips of sound."""

    takes = "audio"
    type: Literal["audio_classification"]
    audio: str = "audio"
    label: str = "label"
    labels: list[str] | None = None
    max_seconds: Annotated[float, Field(ge=0.1)] = 10.0
    metric: str | None = None
    # Clips are measured in seconds; see `recipe.task_checks`.
    max_length: Positive = Field(128, exclude=True)


TaskConfig = Annotated[
    TextClassificationConfig
    | TokenClassificationConfig
    | QuestionAnsweringConfig
    | GenerationConfig
    | ImageClassificationConfig
    | AudioClassificationConfig,
    Field(discriminator="type"),
]
