"""The recipe's freezing section: one class for each policy."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dist_ft.config_base import DurationField, Positive, Section

NonNegative = Annotated[int, Field(ge=0)]


class FreezingBase(Section):
    """What every freezing policy has."""

    switch: Literal["auto", "rebuild", "in_place"] = "auto"
    returning: Literal["keep", "reset"] = "keep"
    prefix_dropout: bool | None = None
    layer_groups: dict[str, str] = Field(default_factory=dict)
    frozen_embedding_rows: list[tuple[NonNegative, NonNegative]] = Field(default_factory=list)


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
