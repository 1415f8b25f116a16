"""The recipe's regularisation and what a task's loss weighs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dist_ft.config_base import DurationField, Fraction, Positive, Section, TaskName
from dist_ft.duration import Duration

Above0 = Annotated[float, Field(gt=0)]
Strength = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class L2SpConfig(Section):
    """A pull to the pre-trained weights, and of new weights to zero."""

    strength: Above0
    heads: Strength | None = None


class DropoutConfig(Section):
    """Dropout by part of the model; what is left out stays as the model has it."""

    embeddings: Probability | None = None
    attention: Probability | None = None
    hidden: Probability | None = None
    head: Probability | None = None


class EmaConfig(Section):
    """An exponential moving average of the weights, scored and exported in their place."""

    type: Literal["ema"]
    decay: Fraction = 0.999
    start: DurationField = Duration(0, "step")
    every: DurationField = Duration(1, "step")


class SwaConfig(Section):
    """The plain mean of weights at intervals from `start` on, scored and exported in their place.

    By default it has the weights after every step from `start` on.
    """

    type: Literal["swa"]
    start: DurationField
    every: DurationField = Duration(1, "step")


AveragingConfig = Annotated[EmaConfig | SwaConfig, Field(discriminator="type")]


class SmartConfig(Section):
    """Adversarial smoothness: little change of the embeddings may change the output little."""

    type: Literal["smart"]
    weight: Above0 = 1.0
    steps: Positive = 1
    step_size: Above0 = 1e-3
    radius: Above0 = 1e-5
    noise: Above0 = 1e-5


class FreeLBConfig(Section):
    """Training on adversarial embeddings, several passes for each micro-batch."""

    type: Literal["freelb"]
    steps: Annotated[int, Field(ge=2)] = 2
    step_size: Above0 = 0.1
    radius: Above0 = 0.6
    init: Above0 = 0.05


AdversarialConfig = Annotated[SmartConfig | FreeLBConfig, Field(discriminator="type")]


class CutoffConfig(Section):
    """A second forward without some words, and its consistency with the first."""

    share: Fraction = 0.1
    weight: Strength = 1.0
    consistency: Strength = 1.0


class MixupConfig(Section):
    """Hidden states of rows are mixed after one of `blocks`, counted from 0 at the bottom."""

    blocks: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    alpha: Above0 = 0.4


class FixedBalancing(Section):
    """What the loss of each task weighs while it trains; 1 for tasks that are not named."""

    policy: Literal["fixed"] = "fixed"
    weights: dict[TaskName, Above0] = Field(default_factory=dict)


class UncertaintyBalancing(Section):
    """Weights by a variance that is learnt for each task."""

    policy: Literal["uncertainty"]
    lr: Above0 = 1e-3


class DwaBalancing(Section):
    """More weight for tasks whose loss has fallen little over the last two intervals."""

    policy: Literal["dwa"]
    every: Positive = 100
    temperature: Above0 = 2.0


class GradNormBalancing(Section):
    """Weights that make the tasks' gradients equally large in the top of what they share."""

    policy: Literal["gradnorm"]
    lr: Above0 = 0.025
    alpha: Strength = 1.5


class FamoBalancing(Section):
    """Weights by which all losses fall by the same share."""

    policy: Literal["famo"]
    lr: Above0 = 0.025
    decay: Strength = 1e-3


def _parse_balancing(value: Any) -> Any:
    if isinstance(value, dict) and "policy" not in value:
        return {"policy": "fixed", **value}
    return value


BalancingConfig = Annotated[
    FixedBalancing | UncertaintyBalancing | DwaBalancing | GradNormBalancing | FamoBalancing,
    Field(discriminator="policy"),
    BeforeValidator(_parse_balancing),
]


class RegularizationConfig(Section):
    """What keeps a model from learning its training rows by heart."""

    l1: Strength = 0.0
    l2: Strength = 0.0
    l2_sp: L2SpConfig | None = None
    mixout: Fraction | None = None
    averaging: AveragingConfig | None = None
    label_smoothing: Fraction | None = None
    r_drop: Above0 | None = None
    neftune_alpha: Above0 | None = None
    adversarial: AdversarialConfig | None = None
    cutoff: CutoffConfig | None = None
    mixup: MixupConfig | None = None
    tasks: Annotated[list[TaskName], Field(min_length=1)] | None = None
    dropout: DropoutConfig = DropoutConfig()
    reinitialize_blocks: Positive | None = None
