"""The recipe's evaluation: when, what decides, and when to stop."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dist_ft.config_base import DurationField, Positive, Section, TaskName


class EarlyStoppingConfig(Section):
    """Ends a run whose deciding scores got no better for some evaluations in a row."""

    patience: Positive = 3
    min_delta: Annotated[float, Field(ge=0)] = 0.0


class EvaluationConfig(Section):
    """When the validation splits are scored, and which score decides what is best."""

    every: DurationField | None = None
    micro_batch_size: Positive | None = None
    decide_by: Literal["each", "mean", "worst", "weighted"] = "each"
    weights: dict[TaskName, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    early_stopping: EarlyStoppingConfig | None = None
