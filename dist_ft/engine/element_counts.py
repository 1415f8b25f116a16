"""Which parameters require a gradient, and how many elements they have, under every ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from dist_ft.optim.param_groups import ParamGroup


def model_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by the model's own names (the loss wrapper's prefix removed)."""
    return {name.removeprefix("model."): p for name, p in module.named_parameters()}


def group_sizes(
    module: nn.Module, groups: Sequence[ParamGroup]
) -> dict[str, list[tuple[str, int]]]:
    """Return name and number of elements of each group's parameters, in the group's order."""
    numel = {n: int(getattr(p, "ds_numel", p.numel())) for n, p in model_parameters(module).items()}
    return {g.name: [(n, numel[n]) for n in g.parameters] for g in groups}


def fixed_sizes(module: nn.Module, groups: Sequence[ParamGroup]) -> dict[str, int]:
    """Return the number of elements of each parameter that is in no group."""
    grouped = {name for group in groups for name in group.parameters}
    return {
        name: int(getattr(p, "ds_numel", p.numel()))
        for name, p in model_parameters(module).items()
        if name not in grouped
    }


def require_grad(
    parameters: Mapping[str, nn.Parameter],
    *,
    wanted: frozenset[str],
    groups: Sequence[ParamGroup],
    fixed: Iterable[str],
) -> None:
    """Let the parameters of some layer groups require a gradient, and no others.

    Args:
        parameters: By name.
        wanted: The layer groups.
        groups: All parameter groups.
        fixed: Parameters that never train.
    """
    for name in fixed:
        parameters[name].requires_grad_(False)
    for group in groups:
        for name in group.parameters:
            parameters[name].requires_grad_(group.layer_group in wanted)


def element_counts(
    parameters: Mapping[str, nn.Parameter],
    *,
    sizes: Mapping[str, Sequence[tuple[str, int]]],
    fixed: Mapping[str, int],
) -> tuple[int, int]:
    """Return how many elements require a gradient now, and how many do not.

    Args:
        parameters: By name.
        sizes: Name and number of elements of the parameters of each group.
        fixed: The elements of those of no group.
    """
    numel = {name: size for group in sizes.values() for name, size in group}
    trainable = sum(numel[n] for n, p in parameters.items() if p.requires_grad)
    return trainable, sum(numel.values()) + sum(fixed.values()) - trainable
