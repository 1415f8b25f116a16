"""Find the stacks of transformer blocks in a backbone by structure and execution."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from dist_ft.model.probe import Probe

BACKBONE = "backbone."


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after another.

    Attributes:
        prefix: of the group names, ``encoder.`` where there is more than one stack.
        root: path, with a dot, of the module that belongs to this stack alone.
        blocks: for each block the paths of its modules (one, or the parts of parallel lists).
    """

    prefix: str
    root: str
    blocks: tuple[tuple[str, ...], ...]


def block_lists(backbone: nn.Module) -> list[list[str]]:
    """Returns the paths of the elements of each top-most ModuleList with parameters.

    Nested lists are flattened.
    """

    def elements(path: str, module: nn.Module) -> Iterator[str]:
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList):
                yield from elements(f"{path}.{name}", child)
            else:
                yield f"{path}.{name}"

    def search(path: str, module: nn.Module) -> Iterator[list[str]]:
        for name, child in module.named_children():
            here = f"{path}.{name}"
            if next(child.parameters(), None) is None:
                continue
            if isinstance(child, nn.ModuleList):
                yield list(elements(here, child))
            else:
                yield from search(here, child)

    return list(search(BACKBONE.removesuffix("."), backbone))


def find_stacks(
    model: nn.Module, lists: Sequence[Sequence[str]], probes: Mapping[str, Probe]
) -> list[Stack]:
    """Returns the stacks of blocks in the order of execution.

    Lists whose elements alternate (XLM keeps attentions and feed-forwards in lists of their own)
    are the parts of one stack. Convolutions that shorten the input are not blocks.
    """
    found: dict[tuple[tuple[str, ...], ...], None] = {}
    # the task that runs most says how stacks follow one another (encoder before decoder)
    for probe in sorted(probes.values(), key=lambda p: -len(p.calls)):
        clusters = _clusters(probe, lists)
        uniform = [c for c in clusters if all(probe.calls[p].keeps_shape for p in c[0])]
        for cluster in uniform or sorted(clusters, key=lambda c: _size(model, c))[-1:]:
            found.setdefault(_zip_parts(cluster))
    return _named_stacks(list(found))


def _clusters(probe: Probe, lists: Sequence[Sequence[str]]) -> list[list[list[str]]]:
    """Lists that ran, those of overlapping execution together, in the order of execution."""
    ran = [[path for path in paths if path in probe.calls] for paths in lists]
    clusters: list[list[list[str]]] = []
    for paths in sorted(filter(None, ran), key=lambda p: first_start(probe, p)):
        before = [path for other in clusters[-1] for path in other] if clusters else []
        if before and first_start(probe, paths) < last_end(probe, before):
            clusters[-1].append(paths)
        else:
            clusters.append([paths])
    return clusters


def first_start(probe: Probe, paths: Iterable[str]) -> int:
    """Returns the tick at which the first of the modules started."""
    return min(probe.calls[path].start for path in paths)


def last_end(probe: Probe, paths: Iterable[str]) -> int:
    """Returns the tick at which the last of the modules ended its first execution."""
    return max(probe.calls[path].end for path in paths)


def _size(model: nn.Module, cluster: Sequence[Sequence[str]]) -> int:
    modules = [model.get_submodule(path) for paths in cluster for path in paths]
    return sum(p.numel() for module in modules for p in module.parameters())


def _zip_parts(cluster: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    if len(cluster) == 1:
        return tuple((path,) for path in cluster[0])
    blocks: dict[str, list[str]] = {}
    for paths in cluster:
        for path in paths:
            blocks.setdefault(path.rpartition(".")[2], []).append(path)
    return tuple(tuple(parts) for parts in blocks.values())


def _named_stacks(found: Sequence[tuple[tuple[str, ...], ...]]) -> list[Stack]:
    """Names stacks by the module in which they differ: ``encoder.`` and ``decoder.``."""
    stacks = []
    for blocks in found:
        mine = blocks[0][0].split(".")
        shared = 0
        for other in found:
            if other is not blocks:
                theirs = other[0][0].split(".")
                common = [a == b for a, b in zip(mine, theirs, strict=False)]
                shared = max(shared, common.index(False))
        prefix = f"{mine[shared]}." if len(found) > 1 else ""
        root = ".".join(mine[: shared + 1]) if len(found) > 1 else "backbone"
        stacks.append(Stack(prefix=prefix, root=f"{root}.", blocks=blocks))
    return stacks


def group_modules(model: nn.Module, parameters: Sequence[str]) -> list[nn.Module]:
    """Return the largest modules all of whose parameters are among `parameters`."""
    names = set(parameters)
    found: list[nn.Module] = []

    def visit(module: nn.Module, prefix: str) -> None:
        own = [n for n, _ in module.named_parameters(prefix=prefix)]
        if own and names.issuperset(own):
            found.append(module)
            return
        for child_name, child in module.named_children():
            visit(child, f"{prefix}.{child_name}" if prefix else child_name)

    visit(model, "")
    return found
