"""The phases that a recipe will go through, as far as they are known before its data are read."""

from __future__ import annotations

from dataclasses import dataclass

from dist_ft.config import Recipe
from dist_ft.duration import Duration
from dist_ft.freezing.policies import BlockPolicy, FreezePolicy, ScheduledPolicy
from dist_ft.freezing.schedule import LayerOrder
from dist_ft.planning.shape import ModelShape
from dist_ft.train.policy import check_every_task_trains, make_policy

# Periods of a policy that draws blocks: enough for its mean and its worst.
PERIODS = 32


@dataclass(frozen=True)
class Epoch:
    """How long an epoch is taken to be.

    Attributes:
        steps: Optimizer steps.
        basis: How that is known, in words.
    """

    steps: float
    basis: str


GUESSED_EPOCH = Epoch(
    1000.0,
    "an epoch is taken as 1,000 steps, as the data are not prepared: give --epoch-steps, or run "
    "`dist-ft prepare` first",
)


@dataclass(frozen=True)
class PlannedPhase:
    """A phase with its share of the run.

    Attributes:
        label: What the phase is called in the table.
        trainable: Layer groups that train.
        share: Of the run's steps; 0 for a bound that may never be reached.
        before: Layer groups that may have trained before it, whose moments are kept.
    """

    label: str
    trainable: frozenset[str]
    share: float
    before: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Schedule:
    """The phases of a run.

    Attributes:
        phases: In order.
        universe: Layer groups that may ever train.
        switch: How phases change.
        total_steps: Length of the run.
        epoch: What its length and its phases rest on; None if nothing is given in epochs.
        assumptions: What was assumed to find them.
    """

    phases: tuple[PlannedPhase, ...]
    universe: frozenset[str]
    switch: str
    total_steps: int
    epoch: Epoch | None
    assumptions: tuple[str, ...]


def schedule_of(recipe: Recipe, shape: ModelShape, *, epoch: Epoch = GUESSED_EPOCH) -> Schedule:
    """Return the phases of a recipe.

    Args:
        recipe: A loaded recipe.
        shape: Its model's shape.
        epoch: Its length, which only the data tell.

    Raises:
        ValueError: If the freezing section does not fit the model.
    """
    assumptions: list[str] = []
    tokens = recipe.train.global_batch_size * sum(t.max_length for t in recipe.tasks)
    units: set[str] = set()

    def to_steps(duration: Duration) -> int:
        units.add(duration.unit)
        return duration.steps(
            steps_per_epoch=epoch.steps,
            tokens_per_step=tokens / len(recipe.tasks) * recipe.mixture.tasks_per_step,
        )

    total = max(1, to_steps(recipe.train.max_duration))
    order = LayerOrder.of([(g.name, g.freezing_kind) for g in shape.groups])
    policy = make_policy(
        recipe.freezing, order=order, to_steps=to_steps, total_steps=total, seed=recipe.seed
    )
    check_every_task_trains(
        policy,
        tasks=[t.name for t in recipe.tasks],
        reach={g.name: g.tasks for g in shape.groups},
    )
    phases, note = _phases(policy, total_steps=total)
    if note:
        assumptions.append(note)
    if "ep" in units:
        assumptions.append(f"{epoch.basis}; it moves shares and times, not memory")
    if "tok" in units:
        assumptions.append("every row is taken as max_length tokens where lengths are in tokens")
    used = epoch if "ep" in units else None
    switch = policy.suits() if recipe.freezing.switch == "auto" else recipe.freezing.switch
    return Schedule(phases, policy.universe(), switch, total, used, tuple(assumptions))


def _phases(
    policy: FreezePolicy, *, total_steps: int
) -> tuple[tuple[PlannedPhase, ...], str | None]:
    if isinstance(policy, ScheduledPolicy):
        listed = [p for p in policy.phases if p.start_step < total_steps]
        ends = [*(p.start_step for p in listed[1:]), total_steps]
        planned: list[PlannedPhase] = []
        before: frozenset[str] = frozenset()
        for phase, end in zip(listed, ends, strict=True):
            trainable, share = frozenset(phase.trainable), (end - phase.start_step) / total_steps
            planned.append(PlannedPhase(str(phase.index), trainable, share, before))
            before |= trainable
        return tuple(planned), None
    if isinstance(policy, BlockPolicy):
        count = min(PERIODS, max(1, -(-total_steps // policy.draw.every)))
        # As they stand for later ones too, each may come after all that ever trains.
        before = policy.universe() if total_steps > policy.draw.every else frozenset[str]()
        return tuple(
            PlannedPhase(f"draw {i}", frozenset(policy.draw.trainable(i)), 1 / count, before)
            for i in range(count)
        ), f"the first {count} draws of the blocks stand for all"
    first = frozenset(policy.phase_at(0).trainable)
    everything = policy.universe()
    if first == everything:
        return (PlannedPhase("0 and all later", first, 1.0),), (
            "the policy freezes by measurement: later phases train less, at an unknown step"
        )
    return (
        PlannedPhase("0", first, 1.0),
        PlannedPhase("at most", everything, 0.0),
    ), "the policy unfreezes by measurement: `at most` is the bound that it may reach"
