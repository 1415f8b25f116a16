"""The recipe: what a run trains, on which data and how; read from YAML and checked strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dist_ft.config_base import (
    DurationField,
    Fraction,
    Name,
    Positive,
    Section,
    TaskName,
)
from dist_ft.config_data import (
    AnnealedMixture,
    BanditMixtureConfig,
    CasingConfig,
    CharacterNoiseConfig,
    DataConfig,
    FixedMixture,
    KeyboardTyposConfig,
    MentionReplacementConfig,
    MixtureConfig,
    ProportionalMixture,
    PunctuationInsertionConfig,
    RoundRobinMixture,
    SentenceShufflingConfig,
    SourceConfig,
    SourceField,
    SplitField,
    TemperatureMixture,
    TransformBase,
    TransformConfig,
    UnimaxMixture,
    WordDropoutConfig,
    WordReplacementConfig,
)
from dist_ft.config_evaluation import EarlyStoppingConfig, EvaluationConfig
from dist_ft.config_freezing import (
    AdaptiveFreezing,
    BottomUpFreezing,
    ExplicitFreezing,
    ExplicitPhase,
    FreezingBase,
    FreezingConfig,
    GradualFreezing,
    NoFreezing,
    PlateauFreezing,
    RandomBlockFreezing,
    StaticFreezing,
)
from dist_ft.config_lora import LoraConfig
from dist_ft.config_regularization import (
    BalancingConfig,
    DropoutConfig,
    FixedBalancing,
    L2SpConfig,
    RegularizationConfig,
)
from dist_ft.config_tasks import (
    GenerationConfig,
    ImageClassificationConfig,
    QuestionAnsweringConfig,
    TaskBase,
    TaskConfig,
    TextClassificationConfig,
    TokenClassificationConfig,
)
from dist_ft.duration import Duration

__all__ = [
    "AdaptiveFreezing",
    "AnnealedMixture",
    "BadNumbersConfig",
    "BalancingConfig",
    "BanditMixtureConfig",
    "BottomUpFreezing",
    "CasingConfig",
    "CharacterNoiseConfig",
    "CheckpointConfig",
    "DataConfig",
    "DropoutConfig",
    "DurationField",
    "EarlyStoppingConfig",
    "EngineConfig",
    "EvaluationConfig",
    "ExplicitFreezing",
    "ExplicitPhase",
    "FixedMixture",
    "Fraction",
    "FreezingBase",
    "FreezingConfig",
    "GenerationConfig",
    "GradualFreezing",
    "ImageClassificationConfig",
    "KeyboardTyposConfig",
    "L2SpConfig",
    "LoggingConfig",
    "LoraConfig",
    "LrScheduleConfig",
    "MentionReplacementConfig",
    "MixtureConfig",
    "ModelConfig",
    "Name",
    "NoFreezing",
    "OptimConfig",
    "PlateauFreezing",
    "Positive",
    "ProportionalMixture",
    "PunctuationInsertionConfig",
    "QuestionAnsweringConfig",
    "RandomBlockFreezing",
    "Recipe",
    "RegularizationConfig",
    "RoundRobinMixture",
    "Section",
    "SentenceShufflingConfig",
    "SourceConfig",
    "SourceField",
    "SplitField",
    "StaticFreezing",
    "SupervisionConfig",
    "TaskBase",
    "TaskConfig",
    "TaskName",
    "TemperatureMixture",
    "TextClassificationConfig",
    "TokenClassificationConfig",
    "TrainConfig",
    "TransformBase",
    "TransformConfig",
    "UnimaxMixture",
    "WordDropoutConfig",
    "WordReplacementConfig",
]


class ModelConfig(Section):
    """Backbone: where its weights come from and how it is run."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    pad_token: str | None = None
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    activation_checkpointing: Literal["none", "reentrant", "non_reentrant"] = "none"
    padding: Literal["auto", "padded", "unpadded"] = "auto"
    lora: LoraConfig | None = None


class LrScheduleConfig(Section):
    """Shape of the learning rate over the run."""

    type: Literal["constant", "linear", "cosine", "slanted_triangular", "wsd", "one_cycle"] = (
        "linear"
    )
    warmup: DurationField = Duration(0, "step")
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    decay: Fraction = 0.1

    @model_validator(mode="after")
    def _decay_is_used(self) -> Self:
        if self.type != "wsd" and self.decay != 0.1:
            raise ValueError(
                f"decay is how long wsd decays, got type {self.type}: remove it or use wsd"
            )
        return self


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
    join_timeout_s: Positive = 1800


class BadNumbersConfig(Section):
    """What happens when loss or gradient are not finite, or the loss leaps."""

    roll_back_after: Positive = 3
    max_roll_backs: Annotated[int, Field(ge=0)] = 2
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    spike_window: Annotated[int, Field(ge=5)] = 50


class TrainConfig(Section):
    """How long and in which batches."""

    max_duration: DurationField
    global_batch_size: Positive
    micro_batch_size: Positive
    micro_batch_tokens: Positive | None = None
    layout: Literal["in_order", "by_length", "packed"] = "by_length"
    on_bad_numbers: BadNumbersConfig = BadNumbersConfig()

    @model_validator(mode="before")
    @classmethod
    def _tokens_decide(cls, values: Any) -> Any:
        """A budget in tokens alone: one micro-batch would do, if it had room for all rows."""
        if isinstance(values, dict) and values.get("micro_batch_tokens") is not None:
            size = values.get("global_batch_size")
            return values if size is None else {"micro_batch_size": size, **values}
        return values

    @model_validator(mode="after")
    def _lays_out(self) -> Self:
        if self.micro_batch_tokens is not None and self.layout == "in_order":
            raise ValueError(
                "micro_batch_tokens needs layout by_length or packed, got in_order: change one"
            )
        return self

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


class CheckpointConfig(Section):
    """When the run's state is saved and how many are kept."""

    every: DurationField | None = None
    keep_last: Positive = 2
    keep_every: DurationField | None = None
    keep_best: bool = False
    ephemeral_every: DurationField | None = None
    in_background: bool = True


class SupervisionConfig(Section):
    """When a rank counts as hung, so that the launcher starts again, and when as slow."""

    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    slow_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    straggler_factor: Annotated[float, Field(gt=1)] = 1.5
    straggler_intervals: Positive = 3


class CacheConfig(Section):
    """Whether what a frozen prefix returns is kept on disk, where, and how much of it."""

    policy: Literal["auto", "on", "off"] = "auto"
    dir: Path | None = None
    budget_gb: Annotated[float, Field(gt=0)] = 50.0
    variants: Positive | None = None
    drop_prefix: bool = False


class LoggingConfig(Section):
    """How often a step event is written, and where else than into ``metrics.jsonl``."""

    every: Positive = 10
    groups_every: Positive | None = None
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] | None = None


class Recipe(Section):
    """A complete run."""

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    output_dir: Path = Path("runs")
    data_dir: Path = Path("data")
    data_processes: Positive = 1
    model: ModelConfig
    tasks: Annotated[list[TaskConfig], Field(min_length=1)]
    mixture: MixtureConfig = RoundRobinMixture()
    freezing: FreezingConfig = NoFreezing()
    cache: CacheConfig = CacheConfig()
    optim: OptimConfig = OptimConfig()
    regularization: RegularizationConfig = RegularizationConfig()
    balancing: BalancingConfig = FixedBalancing()
    engine: EngineConfig = EngineConfig()
    kernels: Literal["auto", "reference", "strict"] = "auto"
    train: TrainConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    supervision: SupervisionConfig = SupervisionConfig()

    @model_validator(mode="after")
    def _packed_rows_have_no_padding(self) -> Self:
        if self.train.layout == "packed" and self.model.padding == "padded":
            raise ValueError(
                "train.layout packed needs blocks that run without padding, got model.padding "
                "padded: remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [task.name for task in self.tasks]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(
                f"tasks must have different names, got {', '.join(twice)} twice: rename one"
            )
        return self
