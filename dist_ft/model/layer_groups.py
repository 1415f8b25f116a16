"""Layer groups: the parameters of a model in the order in which the forward meets them.

Groups are found by structure and execution, not by a table of names. The transformer blocks are the
elements of the top-most ``nn.ModuleList`` whose elements run one after another and keep the shape
of the hidden states; what is used before the first block is ``embeddings``, after the last one
``final_norm`` or a pooler. A shared parameter belongs to its lowest user.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn

from dist_ft.model.backbone import MultiTaskModel
from dist_ft.model.probe import Probe, probe_task
from dist_ft.model.stacks import BACKBONE, Stack, block_lists, find_stacks, first_start, last_end

_HEADS = "heads."
_BEFORE, _INSIDE, _AFTER = 0, 1, 2


@dataclass(frozen=True)
class LayerGroup:
    """Parameters that are frozen and unfrozen together.

    Attributes:
        name: ``embeddings``, ``block.0`` ..., ``encoder.block.0`` ..., ``final_norm``, ``pooler``,
            ``head.TASK``, ``unused``.
        kind: ``embeddings``, ``block``, ``final_norm``, ``pooler``, ``head``, ``unused`` (no
            task's loss reaches it) or ``override``.
        parameters: names as in ``MultiTaskModel.named_parameters()``.
        tasks: tasks whose loss reaches the parameters.
        fixed: those of the parameters that never train, as the weights beside an adapter.
    """

    name: str
    kind: str
    parameters: tuple[str, ...]
    tasks: frozenset[str]
    fixed: frozenset[str] = frozenset()

    @property
    def trained(self) -> tuple[str, ...]:
        """The parameters that train when the group does."""
        return tuple(name for name in self.parameters if name not in self.fixed)

    @property
    def freezing_kind(self) -> str:
        """The kind as schedules see it: a group of which nothing can train is ``unused``."""
        return self.kind if self.trained else "unused"


class _Place(NamedTuple):
    """Where a parameter is first used; places compare bottom to top."""

    stack: int
    phase: int
    block: int


def find_layer_groups(
    model: MultiTaskModel, *, overrides: Mapping[str, str] | None = None
) -> list[LayerGroup]:
    """Returns the layer groups bottom to top; every parameter is in exactly one of them.

    Runs one forward per task on a few tokens (see ``model.probe``); the model is left as it was.

    Args:
        model: the model, before any engine has wrapped or partitioned it.
        overrides: group name -> regular expression that is searched in parameter names. Matched
            parameters leave the group that was found for them. A new group is put in the place of
            the lowest parameter in it.

    Raises:
        ValueError: no blocks are found and the overrides do not cover the backbone, or an override
            is invalid, matches nothing or what another one has matched.
    """
    matched = _match_overrides(model, overrides or {})
    lists = block_lists(model.backbone)
    watched = {path: model.get_submodule(path) for blocks in lists for path in blocks}
    uncovered = [n for n in _names(model) if n.startswith(BACKBONE) and n not in matched]
    try:
        probes = {task: probe_task(model, task=task, watched=watched) for task in model.tasks}
    # Whatever a model of an unknown kind raises on tokens that were not meant for it.
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        if uncovered:
            raise ValueError(
                f"layer groups: {type(model.backbone).__name__} cannot be run on a dummy input "
                f"({error}); give its groups by freezing.layer_groups (name: regex)"
            ) from error
        return _from_overrides(model, matched, probes={})
    stacks = find_stacks(model, lists, probes)
    if not stacks and uncovered:
        raise ValueError(
            f"layer groups: no list of repeated blocks found in {type(model.backbone).__name__}; "
            f"give its groups by freezing.layer_groups (name: regex); {uncovered[0]} is in none"
        )
    if not stacks:
        return _from_overrides(model, matched, probes=probes)
    groups = _groups(model, stacks, probes)
    return _apply_overrides(groups, matched)


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _groups(
    model: MultiTaskModel, stacks: Sequence[Stack], probes: Mapping[str, Probe]
) -> list[LayerGroup]:
    places = _places(model, stacks, probes)
    reached = {
        name: frozenset(task for task, probe in probes.items() if name in probe.first_use)
        for name in _names(model)
    }
    keyed: dict[tuple[_Place, str, str], list[str]] = {}
    unused: list[str] = []
    for name in _names(model):
        if name.startswith(_HEADS):
            continue
        if name not in places:
            unused.append(name)
            continue
        label, kind = _label(model, stacks, name, places[name])
        keyed.setdefault((places[name], label, kind), []).append(name)
    first = {key: _earliest(names, probes) for key, names in keyed.items()}
    groups = [LayerGroup("unused", "unused", tuple(unused), frozenset())] if unused else []
    for key in sorted(keyed, key=lambda k: (k[0], first[k])):
        groups.extend(_split_by_tasks(key[1], key[2], keyed[key], reached))
    return _join_same_names(groups) + _heads(model)


def _earliest(names: Sequence[str], probes: Mapping[str, Probe]) -> tuple[int, ...]:
    """Sort key for groups at the same place: their first uses, task by task."""
    late = 1 << 62
    return tuple(
        min((probe.first_use.get(name, late) for name in names), default=late)
        for probe in probes.values()
    )


def _places(
    model: MultiTaskModel, stacks: Sequence[Stack], probes: Mapping[str, Probe]
) -> dict[str, _Place]:
    places: dict[str, _Place] = {}
    for name in _names(model):
        if name.startswith(_HEADS):
            continue
        seen = [
            _place(stacks, probe, name) for probe in probes.values() if name in probe.first_use
        ] or _by_containment(stacks, name)
        if seen:
            places[name] = min(seen)
    return places


def _place(stacks: Sequence[Stack], probe: Probe, name: str) -> _Place:
    """The place of a parameter by the time of its first use in one task's forward."""
    tick = probe.first_use[name]
    last = _Place(0, _BEFORE, 0)
    for index, stack in enumerate(stacks):
        ran = [[part for part in parts if part in probe.calls] for parts in stack.blocks]
        if not any(ran):
            continue
        if tick <= first_start(probe, (part for parts in ran for part in parts)):
            mine = name.startswith(stack.root) or last.phase == _BEFORE
            return _Place(index, _BEFORE, 0) if mine else last
        for number, parts in enumerate(ran):
            if parts and first_start(probe, parts) < tick <= last_end(probe, parts):
                return _Place(index, _INSIDE, number)
        last = _Place(index, _AFTER, 0)
    return last


def _by_containment(stacks: Sequence[Stack], name: str) -> list[_Place]:
    """The block that contains a parameter which no probe reached (an expert not chosen)."""
    return [
        _Place(index, _INSIDE, number)
        for index, stack in enumerate(stacks)
        for number, parts in enumerate(stack.blocks)
        if any(name.startswith(f"{part}.") for part in parts)
    ]


def _label(model: nn.Module, stacks: Sequence[Stack], name: str, place: _Place) -> tuple[str, str]:
    """Group name and kind for a backbone parameter at its place."""
    stack = stacks[place.stack]
    if place.phase == _INSIDE:
        return f"{stack.prefix}block.{place.block}", "block"
    if place.phase == _BEFORE:
        return ("embeddings" if place.stack == 0 else f"{stack.prefix}embeddings"), "embeddings"
    top = _topmost_without_blocks(stacks, name)
    module = model.get_submodule(top) if top else None
    own = list(module.parameters()) if module else [model.get_parameter(name)]
    prefix = stack.prefix if name.startswith(stack.root) else ""
    if all(parameter.dim() <= 1 for parameter in own):
        return f"{prefix}final_norm", "final_norm"
    return f"{prefix}{(top or name).rpartition('.')[2]}", "pooler"


def _topmost_without_blocks(stacks: Sequence[Stack], name: str) -> str | None:
    """Path of the highest module above a parameter that contains no block, if there is one."""
    parts = name.split(".")[:-1]
    blocks = [part for stack in stacks for block in stack.blocks for part in block]
    for length in range(1, len(parts) + 1):
        path = ".".join(parts[:length])
        if not any(block.startswith(f"{path}.") for block in blocks):
            return path
    return None


def _split_by_tasks(
    label: str, kind: str, names: Sequence[str], reached: Mapping[str, frozenset[str]]
) -> list[LayerGroup]:
    """One group per set of tasks, so that a step of a task moves whole groups only."""
    by_tasks: dict[frozenset[str], list[str]] = {}
    union = frozenset[str]().union(*(reached[name] for name in names))
    for name in names:  # parameters that no probe reached follow their block
        by_tasks.setdefault(reached[name] or union, []).append(name)
    ordered = sorted(by_tasks, key=lambda tasks: (-len(tasks), sorted(tasks)))
    groups = []
    for index, tasks in enumerate(ordered):
        name = label if index == 0 else f"{label}.only_{'_'.join(sorted(tasks))}"
        groups.append(LayerGroup(name, kind, tuple(by_tasks[tasks]), tasks))
    return groups


def _join_same_names(groups: Sequence[LayerGroup]) -> list[LayerGroup]:
    joined: dict[tuple[str, frozenset[str]], LayerGroup] = {}
    for group in groups:
        key = (group.name, group.tasks)
        before = joined[key].parameters if key in joined else ()
        joined[key] = replace(group, parameters=before + group.parameters)
    return list(joined.values())


def _heads(model: MultiTaskModel) -> list[LayerGroup]:
    groups = []
    for task in model.tasks:
        names = tuple(n for n in _names(model) if n.startswith(f"{_HEADS}{task}."))
        if names:  # a language model with tied embeddings has no head of its own
            groups.append(LayerGroup(f"head.{task}", "head", names, frozenset({task})))
    return groups


def _match_overrides(model: nn.Module, overrides: Mapping[str, str]) -> dict[str, str]:
    """Parameter name -> group name, for the parameters that the overrides match."""
    matched: dict[str, str] = {}
    names = _names(model)
    for group, pattern in overrides.items():
        try:
            hits = [name for name in names if re.search(pattern, name)]
        except re.error as error:
            raise ValueError(
                f"freezing.layer_groups.{group}: {pattern!r} is no regular expression: {error}"
            ) from None
        if not hits:
            raise ValueError(
                f"freezing.layer_groups.{group}: {pattern!r} matches no parameter; names are like "
                f"{names[0]} and {names[-1]}"
            )
        for name in hits:
            if matched.setdefault(name, group) != group:
                raise ValueError(
                    f"freezing.layer_groups.{group}: {pattern!r} matches {name}, which is "
                    f"already in {matched[name]}; make the expressions exclusive"
                )
    return matched


def _apply_overrides(groups: Sequence[LayerGroup], matched: Mapping[str, str]) -> list[LayerGroup]:
    if not matched:
        return list(groups)
    tasks = {name: group.tasks for group in groups for name in group.parameters}
    members: dict[str, list[str]] = {}
    for group in groups:
        for name in group.parameters:
            members.setdefault(matched.get(name, group.name), []).append(name)
    kinds = {group.name: group.kind for group in groups}
    return [
        LayerGroup(
            group,
            kinds.get(group, "override"),
            tuple(names),
            frozenset[str]().union(*(tasks[name] for name in names)),
        )
        for group, names in members.items()
    ]


def _from_overrides(
    model: MultiTaskModel, matched: Mapping[str, str], *, probes: Mapping[str, Probe]
) -> list[LayerGroup]:
    """Groups for a backbone covered by overrides, in their order.

    Without probes every group is taken to be reached by every task.
    """
    members: dict[str, list[str]] = {}
    for name, group in matched.items():
        members.setdefault(group, []).append(name)
    groups = []
    for group, names in members.items():
        tasks = {t for t, probe in probes.items() if not probe.first_use.keys().isdisjoint(names)}
        reached = frozenset(tasks if probes else model.tasks)
        groups.append(LayerGroup(group, "override", tuple(names), reached))
    heads = [
        replace(group, parameters=tuple(n for n in group.parameters if n not in matched))
        for group in _heads(model)
    ]
    return groups + [group for group in heads if group.parameters]
