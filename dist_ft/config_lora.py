"""The recipe's low-rank adapters."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dist_ft.config_base import Positive, Section


class LoraConfig(Section):
    """Low-rank adapters (LoRA, Hu et al. 2021) train instead of the backbone's own weights."""

    r: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[list[str], Field(min_length=1)] | None = None
