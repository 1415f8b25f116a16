"""The recipe's regularisation: penalties on weights."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dist_ft.config_base import Section

Strength = Annotated[float, Field(ge=0)]


class L2SpConfig(Section):
    """A pull to the pre-trained weights, and of new weights to zero."""

    strength: Annotated[float, Field(gt=0)]
    heads: Strength | None = None


class RegularizationConfig(Section):
    """What keeps a model from learning its training rows by heart."""

    l1: Strength = 0.0
    l2: Strength = 0.0
    l2_sp: L2SpConfig | None = None
