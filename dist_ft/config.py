"""The recipe: what a run trains, on which data and how; read from YAML and checked strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from dist_ft.duration import Duration


def _parse_duration(value: Any) -> Duration:
    if isinstance(value, Duration):
        return value
    if not isinstance(value, str):
        raise ValueError(
            f"a duration needs a unit, got {value!r}: write it like 3ep, 500step or 2e6tok"
        )
    return Duration.parse(value)


DurationField = Annotated[Duration, BeforeValidator(_parse_duration), PlainSerializer(str)]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class Section(BaseModel):
    """Base of every recipe section: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Backbone: where its weights come from and how it is run."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    pad_token: str | None = None
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    activation_checkpointing: Literal["none", "reentrant", "non_reentrant"] = "none"


class SourceConfig(Section):
    """Raw data: a packaged set, files, or a hub data set."""

    path: str
    format: Literal["csv", "json", "jsonl", "parquet", "arrow"] | None = None
    subset: str | None = None
    split: str | None = None
    revision: str | None = None


def _parse_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


SourceField = Annotated[SourceConfig, BeforeValidator(_parse_source)]


def _parse_split(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


SplitField = Annotated[Fraction | SourceConfig, BeforeValidator(_parse_split)]


class DataConfig(Section):
    """Splits of a task: a source for each, or a fraction that is taken out of train by hash."""

    train: SourceField
    validation: SplitField = 0.1
    test: SplitField | None = None


class TaskBase(Section):
    """What every task has."""

    name: TaskName
    data: DataConfig
    max_length: Positive = 128
    on_error: Literal["stop", "skip"] = "stop"


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
    response: str = "response"
    separator: str = "\n"
    max_target_length: Positive = 64
    max_new_tokens: Annotated[int, Field(ge=0)] = 0
    metric: str | None = None


TaskConfig = Annotated[
    TextClassificationConfig
    | TokenClassificationConfig
    | QuestionAnsweringConfig
    | GenerationConfig,
    Field(discriminator="type"),
]


class MixtureConfig(Section):
    """Which task each step trains."""

    policy: Literal["round_robin"] = "round_robin"


class FreezingBase(Section):
    """What every freezing policy has."""

    switch: Literal["auto", "rebuild", "in_place"] = "auto"
    returning: Literal["keep", "reset"] = "keep"
    prefix_dropout: bool = True
    layer_groups: dict[str, str] = {}


class NoFreezing(FreezingBase):
    """Everything trains from the first step to the last."""

    policy: Literal["none"] = "none"


class StaticFreezing(FreezingBase):
    """One phase: the bottom `depth` blocks (and what lies below them), or named groups, frozen."""

    policy: Literal["static"]
    depth: Annotated[int, Field(ge=0)] | None = None
    frozen: list[str] | None = None
    trainable: list[str] | None = None

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        given = [k for k in ("depth", "frozen", "trainable") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of depth, frozen, trainable must be given, got {given or 'none'}: "
                "keep one of them"
            )
        return self


class GradualFreezing(FreezingBase):
    """Top-down unfreezing (ULMFiT, Howard and Ruder 2018, section 3.3)."""

    policy: Literal["gradual"]
    first: Annotated[int, Field(ge=0)] = 0
    groups_per_phase: Positive = 1
    every: DurationField | None = None
    at: list[DurationField] | None = None
    phases: Annotated[int, Field(ge=2)] | None = None

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        given = [k for k in ("every", "at", "phases") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of every, at, phases must be given, got {given or 'none'}: "
                "say when the phases change once"
            )
        return self


class BottomUpFreezing(FreezingBase):
    """Freezes from the bottom while training goes on (FreezeOut, Brock et al. 2017)."""

    policy: Literal["bottom_up"]
    groups_per_phase: Positive = 1
    every: DurationField
    max_depth: Positive | None = None


class PlateauFreezing(FreezingBase):
    """Unfreezes (or freezes) a group when the validation metric stalls."""

    policy: Literal["plateau"]
    direction: Literal["unfreeze", "freeze"] = "unfreeze"
    first: Annotated[int, Field(ge=0)] = 0
    groups_per_phase: Positive = 1
    task: str | None = None
    metric: str | None = None
    patience: Positive = 2
    min_delta: Annotated[float, Field(ge=0)] = 0.0


class AdaptiveFreezing(FreezingBase):
    """Freezes the bottom groups whose gradient norm settled (AutoFreeze, Liu et al. 2021)."""

    policy: Literal["adaptive"]
    signal: Literal["gradient_norm", "plasticity"] = "gradient_norm"
    every: DurationField
    percentile: Annotated[float, Field(gt=0, lt=100)] = 50.0
    max_depth: Positive | None = None


class RandomBlockFreezing(FreezingBase):
    """Trains a few blocks at a time: drawn (LISA, Pan 2024) or in turn (BAdam, Luo 2024)."""

    policy: Literal["random_block"]
    blocks: Positive = 2
    every: DurationField
    order: Literal["random", "ascending", "descending"] = "random"
    always: list[str] | None = None


class ExplicitPhase(Section):
    """One phase of a listed schedule."""

    at: DurationField
    trainable: list[str]


class ExplicitFreezing(FreezingBase):
    """The phases as the user lists them."""

    policy: Literal["explicit"]
    phases: Annotated[list[ExplicitPhase], Field(min_length=1)]


FreezingConfig = Annotated[
    NoFreezing
    | StaticFreezing
    | GradualFreezing
    | BottomUpFreezing
    | PlateauFreezing
    | AdaptiveFreezing
    | RandomBlockFreezing
    | ExplicitFreezing,
    Field(discriminator="policy"),
]


class LrScheduleConfig(Section):
    """Shape of the learning rate over the run."""

    type: Literal["constant", "linear", "cosine", "slanted_triangular"] = "linear"
    warmup: DurationField = Duration(0, "step")
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0


class OptimConfig(Section):
    """AdamW and its learning rates."""

    lr: Annotated[float, Field(gt=0)] = 2e-5
    head_lr: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    schedule: LrScheduleConfig = LrScheduleConfig()
    unfreeze_warmup: DurationField = Duration(0, "step")


class EngineConfig(Section):
    """Who executes a step, in which precision, partitioned how."""

    type: Literal["deepspeed", "reference"] = "deepspeed"
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    offload_optimizer: bool = False
    deepspeed: Path | None = None
    collective_timeout_s: Positive = 600


class TrainConfig(Section):
    """How long and in which batches."""

    max_duration: DurationField
    global_batch_size: Positive
    micro_batch_size: Positive

    @model_validator(mode="after")
    def _divides(self) -> Self:
        micro = self.micro_batch_size
        if self.global_batch_size % micro:
            nearest = max(1, self.global_batch_size // micro) * micro
            raise ValueError(
                f"global_batch_size must be a multiple of micro_batch_size ({micro}), "
                f"got {self.global_batch_size}: use {nearest} or another micro_batch_size"
            )
        return self


class EvaluationConfig(Section):
    """When the validation splits are scored."""

    every: DurationField | None = None
    micro_batch_size: Positive | None = None


class CheckpointConfig(Section):
    """When the run's state is saved and how many are kept."""

    every: DurationField | None = None
    keep_last: Positive = 2


class LoggingConfig(Section):
    """How often a step event is written."""

    every: Positive = 10
    groups_every: Positive | None = None


class Recipe(Section):
    """A complete run."""

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    output_dir: Path = Path("runs")
    data_dir: Path = Path("data")
    model: ModelConfig
    tasks: Annotated[list[TaskConfig], Field(min_length=1)]
    mixture: MixtureConfig = MixtureConfig()
    freezing: FreezingConfig = NoFreezing()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    train: TrainConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [task.name for task in self.tasks]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(
                f"tasks must have different names, got {', '.join(twice)} twice: rename one"
            )
        return self
