"""The recipe's regularisation and what a task's loss weighs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dist_ft.config_base import Fraction, Positive, Section, TaskName

Strength = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class L2SpConfig(Section):
    """A pull to the pre-trained weights, and of new weights to zero."""

    strength: Annotated[float, Field(gt=0)]
    heads: Strength | None = None


class DropoutConfig(Section):
    """Dropout by part of the model; what is left out stays as the model has it."""

    embeddings: Probability | None = None
    attention: Probability | None = None
    hidden: Probability | None = None
    head: Probability | None = None


class BalancingConfig(Section):
    """What the loss of each task weighs while it trains; 1 for tasks that are not named."""

    weights: dict[TaskName, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)


class RegularizationConfig(Section):
    """What keeps a model from learning its training rows by heart."""

    l1: Strength = 0.0
    l2: Strength = 0.0
    l2_sp: L2SpConfig | None = None
    label_smoothing: Fraction | None = None
    r_drop: Annotated[float, Field(gt=0)] | None = None
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    tasks: Annotated[list[TaskName], Field(min_length=1)] | None = None
    dropout: DropoutConfig = DropoutConfig()
    reinitialize_blocks: Positive | None = None
