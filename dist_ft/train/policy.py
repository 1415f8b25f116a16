"""Makes the freezing policy of a recipe for the layer groups of its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dist_ft.config import (
    AdaptiveFreezing,
    BottomUpFreezing,
    ExplicitFreezing,
    FreezingConfig,
    GradualFreezing,
    NoFreezing,
    PlateauFreezing,
    RandomBlockFreezing,
    StaticFreezing,
)
from dist_ft.duration import Duration
from dist_ft.freezing.adaptive import PlateauPolicy, SettledPolicy
from dist_ft.freezing.policies import BlockPolicy, FreezePolicy, ScheduledPolicy
from dist_ft.freezing.schedule import (
    BlockDraw,
    LayerOrder,
    bottom_up,
    equal_steps,
    every_steps,
    gradual,
    make_phases,
)

PERIODS_CHECKED = 200
ToSteps = Callable[[Duration], int]


def make_policy(
    config: FreezingConfig, *, order: LayerOrder, to_steps: ToSteps, total_steps: int, seed: int
) -> FreezePolicy:
    """Return the policy that `config` describes.

    Args:
        config: The recipe's ``freezing`` section.
        order: The model's layer groups.
        to_steps: Turns a duration into optimizer steps.
        total_steps: Length of the run.
        seed: Of random draws.

    Raises:
        ValueError: If the section does not fit the model.
    """
    if isinstance(config, RandomBlockFreezing):
        # By default everything but the blocks, as LISA does.
        always = order.bottom + order.top + order.heads
        if config.always is not None:
            always = order.match(config.always, where="freezing.always")
        if not set(always) >= set(order.heads):
            missing = sorted(set(order.heads) - set(always))
            raise ValueError(
                f"freezing.always: {', '.join(missing)} would never train, and their weights are "
                "random: add head.*"
            )
        return BlockPolicy(
            BlockDraw(
                order, config.blocks, max(1, to_steps(config.every)), config.order, always, seed
            ),
            total_steps,
        )
    if isinstance(config, PlateauFreezing):
        return PlateauPolicy(
            order,
            direction=config.direction,
            first=config.first,
            groups_per_phase=config.groups_per_phase,
            patience=config.patience,
            min_delta=config.min_delta,
        )
    if isinstance(config, AdaptiveFreezing):
        return SettledPolicy(
            order,
            percentile=config.percentile,
            max_depth=config.max_depth,
            is_rate=config.signal == "plasticity",
        )
    starts = _starts(config, order=order, to_steps=to_steps, total_steps=total_steps)
    return ScheduledPolicy(make_phases(starts, order=order))


def _starts(
    config: FreezingConfig, *, order: LayerOrder, to_steps: ToSteps, total_steps: int
) -> list[tuple[int, tuple[str, ...]]]:
    match config:
        case NoFreezing():
            return [(0, order.everything)]
        case StaticFreezing():
            return [(0, _static(config, order))]
        case GradualFreezing():
            starts = gradual(
                order,
                first=config.first,
                groups_per_phase=config.groups_per_phase,
                change_steps=_change_steps(config, to_steps=to_steps, total_steps=total_steps),
            )
            if config.phases is not None and len({step for step, _ in starts}) < len(starts):
                raise ValueError(
                    f"freezing.phases: {config.phases} phases do not fit into the run's "
                    f"{total_steps} steps: lower it, or train longer"
                )
            return starts
        case BottomUpFreezing():
            return bottom_up(
                order,
                groups_per_phase=config.groups_per_phase,
                change_steps=every_steps(to_steps(config.every), total_steps=total_steps),
                max_depth=config.max_depth or len(order.blocks),
            )
        case ExplicitFreezing():
            return [
                (to_steps(p.at), order.match(p.trainable, where=f"freezing.phases[{i}].trainable"))
                for i, p in enumerate(config.phases)
            ]
        case _:
            raise ValueError(f"freezing.policy {config.policy} has no schedule of its own")


def _static(config: StaticFreezing, order: LayerOrder) -> tuple[str, ...]:
    if config.depth is not None:
        return order.above(config.depth)
    if config.trainable is not None:
        return order.match(config.trainable, where="freezing.trainable")
    frozen = set(order.match(config.frozen or [], where="freezing.frozen"))
    return tuple(name for name in order.everything if name not in frozen)


def _change_steps(config: GradualFreezing, *, to_steps: ToSteps, total_steps: int) -> list[int]:
    if config.at is not None:
        return [to_steps(at) for at in config.at]
    if config.every is not None:
        return every_steps(to_steps(config.every), total_steps=total_steps)
    return equal_steps(config.phases or 1, total_steps=total_steps)


def check_every_task_trains(
    policy: FreezePolicy, *, tasks: Sequence[str], reach: Mapping[str, frozenset[str]]
) -> None:
    """Check that every phase trains something that each task's loss reaches.

    Args:
        policy: The run's policy; measuring ones always train the top.
        tasks: Names of the tasks.
        reach: The tasks whose loss reaches each layer group.

    Raises:
        ValueError: If a step of some task could train nothing at all.
    """
    if isinstance(policy, ScheduledPolicy):
        phases = policy.phases
    elif isinstance(policy, BlockPolicy):
        phases = [policy.phase_at(period * policy.draw.every) for period in range(PERIODS_CHECKED)]
    else:
        phases = [policy.phase_at(0)]
    for phase in phases:
        idle = [t for t in tasks if not any(t in reach[g] for g in phase.trainable)]
        if idle:
            raise ValueError(
                f"freezing: the phase from step {phase.start_step} trains nothing that the loss of "
                f"task {', '.join(idle)} reaches: let its head or a block train in every phase"
            )
