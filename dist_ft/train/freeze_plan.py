"""Writes the phases that a recipe's freezing makes, as an explicit schedule that can be edited."""

from __future__ import annotations

import glob
import itertools
import textwrap
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import yaml

from dist_ft.config import (
    AdaptiveFreezing,
    FreezingConfig,
    GradualFreezing,
    PlateauFreezing,
    Recipe,
)
from dist_ft.config_freezing import FreezingBase
from dist_ft.freezing.policies import BlockPolicy, FreezePolicy, ScheduledPolicy
from dist_ft.freezing.schedule import Phase, make_phases
from dist_ft.train.console import Console
from dist_ft.train.parts import Parts, make_parts
from dist_ft.wording import counted

# What an explicit schedule has in common with every other policy; how phases change is its own.
COMMON = tuple(name for name in FreezingBase.model_fields if name != "switch")
_WIDTH = 96


def write_freeze_plan(
    recipe: Recipe, *, output: Path | None = None, periods: int | None = None
) -> str:
    """Return the recipe's phases as the YAML of a ``freezing`` section, and write it to `output`.

    A run with the section in the place of the recipe's own does the same, bit for bit, as far as
    the listed phases reach. (If blocks are never drawn, the sum over the gradient's square can
    come out differently in its last bit; the text says so.)

    Args:
        recipe: A loaded recipe; its data are prepared if they are not, because a length in epochs
            or tokens depends on them.
        output: A new file.
        periods: How many periods of ``random_block`` to list; by default those of the whole run.

    Raises:
        ValueError: If the phases are decided from measurements, `output` exists, or `periods` is
            given for a policy that has none.
    """
    _check(recipe.freezing, output=output, periods=periods)
    parts = make_parts(recipe, Console(main=True).say)
    text = plan_text(recipe, parts, periods=periods)
    if output is not None:
        output.write_text(text, encoding="utf-8")
    return text


def _check(freezing: FreezingConfig, *, output: Path | None, periods: int | None) -> None:
    if isinstance(freezing, PlateauFreezing | AdaptiveFreezing):
        raise ValueError(
            f"freezing.policy: {freezing.policy} decides its phases from measurements during the "
            "run, so there is no plan before it: see the phase events of a run with `dist-ft "
            "report`, or choose gradual, bottom_up, random_block or static"
        )
    if periods is not None and freezing.policy != "random_block":
        raise ValueError(
            f"--periods: only random_block has periods, got freezing.policy {freezing.policy}: "
            "leave --periods out"
        )
    if periods is not None and periods < 1:
        raise ValueError(f"--periods must be at least 1, got {periods}: raise it")
    if output is not None and output.exists():
        raise ValueError(f"--output: {output} exists already: choose another name or remove it")


def plan_text(recipe: Recipe, parts: Parts, *, periods: int | None = None) -> str:
    """Return the YAML of an explicit ``freezing`` section with the phases of `parts.policy`."""
    phases, end = listed_phases(parts.policy, total_steps=parts.total_steps, periods=periods)
    numel = {name: p.numel() for name, p in parts.model.named_parameters()}
    sizes = {g.name: sum(numel[n] for n in g.trained) for g in parts.groups}
    notes = [
        f"The phases of {recipe.name} (freezing.policy: {recipe.freezing.policy}) over "
        f"{counted(parts.total_steps, 'step')}.",
        f"Layer groups, bottom to top: {', '.join(sizes)}.",
    ]
    if end < parts.total_steps:
        notes.append(
            f"Only the first {periods} periods are listed: the policy would change again at step "
            f"{end}, but the last phase below goes on to the end."
        )
    if reach := reach_text(recipe.freezing, parts):
        notes.append(f"{reach[0].upper()}{reach[1:]}.")
    listed = {name for phase in phases for name in phase.trainable}
    if never := [name for name in sizes if name in parts.policy.universe() - listed]:
        notes.append(
            f"Never trained here: {', '.join(never)}. An engine that switches in place holds these "
            "for the policy, but not for this plan, which can change the last bit of the gradient "
            "norm."
        )
    lines = [f"# {line}" for note in notes for line in textwrap.wrap(note, _WIDTH - 2)]
    lines += ["freezing:", "  policy: explicit", *_common(recipe.freezing, parts.policy)]
    lines.append("  phases:")
    for i, phase in enumerate(phases):
        last = (phases[i + 1].start_step if i + 1 < len(phases) else parts.total_steps) - 1
        lines += _phase_lines(phase, last=last, sizes=sizes)
    return "\n".join(lines) + "\n"


def reach_text(freezing: FreezingConfig, parts: Parts) -> str | None:
    """Return what the last phase of a schedule trains, and which layer groups never train.

    None if the phases are not known before the run, or if there is but one, which says it itself.
    """
    policy = parts.policy
    if not isinstance(policy, ScheduledPolicy):
        return None
    phases, _ = listed_phases(policy, total_steps=parts.total_steps)
    if len(phases) < 2:
        return None
    numel = {name: p.numel() for name, p in parts.model.named_parameters()}
    sizes = {g.name: sum(numel[n] for n in g.trained) for g in parts.groups}
    last = phases[-1]
    share = sum(sizes[name] for name in last.trainable) / max(1, sum(sizes.values()))
    text = f"the last phase, from step {last.start_step} on, trains {share:.1%} of the parameters"
    names = [g.name for g in parts.groups if g.freezing_kind != "unused"]
    never = set(names).difference(*(phase.trainable for phase in phases))
    if not never:
        return f"{text}; every layer group trains in some phase"
    text += f"; never trained: {in_runs(names, never)}"
    if isinstance(freezing, GradualFreezing):
        text += " (more freezing.phases or freezing.groups_per_phase reach them)"
    return text


def in_runs(order: Sequence[str], chosen: Set[str]) -> str:
    """Return names as runs of neighbours, such as "embeddings to block.3, pooler"."""
    runs = [
        list(names) for is_chosen, names in itertools.groupby(order, key=chosen.__contains__)
        if is_chosen
    ]  # fmt: skip
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def listed_phases(
    policy: FreezePolicy, *, total_steps: int, periods: int | None = None
) -> tuple[list[Phase], int]:
    """Return the phases that begin within the run, and the step up to which they are complete.

    Neighbouring periods that train the same are one phase.
    """
    if isinstance(policy, ScheduledPolicy):
        return [p for p in policy.phases if p.start_step < total_steps], total_steps
    if not isinstance(policy, BlockPolicy):
        raise ValueError(f"{type(policy).__name__} decides during the run: it has no plan before")
    every = policy.draw.every
    end = total_steps if periods is None else min(total_steps, periods * every)
    starts = [(start, policy.phase_at(start).trainable) for start in range(0, end, every)]
    return make_phases(starts, order=policy.draw.order), end


def _common(freezing: FreezingConfig, policy: FreezePolicy) -> list[str]:
    section = freezing.model_dump(mode="json", include=set(COMMON), exclude_defaults=True)
    switch = policy.suits() if freezing.switch == "auto" else freezing.switch
    if switch != "rebuild":  # what an explicit policy would choose by itself
        section = {"switch": switch, **section}
    return [f"  {line}" for line in _yaml(section).splitlines()] if section else []


def _phase_lines(phase: Phase, *, last: int, sizes: Mapping[str, int]) -> list[str]:
    total = sum(sizes.values())
    trainable = sum(sizes[name] for name in phase.trainable)
    names = as_patterns(phase.trainable)
    listed = _yaml(names, flow=True).rstrip("\n").replace("\n", "\n      ")
    return [
        f"    # phase {phase.index}, steps {phase.start_step} to {last}: {trainable:,} of "
        f"{total:,} parameters ({100 * trainable / max(1, total):.1f} %)",
        f"    - at: {phase.start_step}step",
        f"      trainable: {listed}",
    ]


def as_patterns(names: Sequence[str]) -> list[str]:
    """Return patterns that match exactly these layer groups in a ``freezing`` section."""
    return [glob.escape(name) for name in names]


def _yaml(value: Any, *, flow: bool = False) -> str:
    return yaml.safe_dump(value, sort_keys=False, default_flow_style=flow, width=_WIDTH)
