"""The learning rate of each layer group in each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dist_ft.config import Recipe
from dist_ft.optim.lr_schedules import LrSchedule, thaw_factor
from dist_ft.optim.param_groups import ParamGroup
from dist_ft.train.parts import Parts


def learning_rates(
    recipe: Recipe, parts: Parts, param_groups: Sequence[ParamGroup]
) -> Callable[[int, Mapping[str, int]], dict[str, float]]:
    """Return (step, step at which each group was unfrozen) to rates by layer group."""
    config = recipe.optim.schedule
    schedule = LrSchedule(
        config.type,
        total_steps=parts.total_steps,
        warmup_steps=parts.lengths.steps(config.warmup),
        min_ratio=config.min_ratio,
        decay=config.decay,
    )
    thaw_steps = parts.lengths.steps(recipe.optim.unfreeze_warmup)
    peaks = {g.layer_group: g.lr for g in param_groups}

    def rates(step: int, thawed_at: Mapping[str, int]) -> dict[str, float]:
        factor = schedule.factor(step)
        return {
            name: peak
            * factor
            * thaw_factor(step, thawed_at=thawed_at.get(name, 0), warmup_steps=thaw_steps)
            for name, peak in peaks.items()
        }

    return rates
