"""Share one backbone between several transformers task models.

A task model (say ``BertForTokenClassification``) contains a backbone of its own. Grafting puts the
shared backbone's modules in that place, so that the forward of the transformers class runs
unchanged on shared weights. The shared modules live in the instance ``__dict__`` of their owner and
not in ``_modules``: attribute access finds them, but ``children()``, ``named_parameters()`` and the
hooks of DeepSpeed meet every module exactly once, below the backbone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Slot:
    """A place of a task model that holds a module of the shared backbone.

    Attributes:
        owner: module of the task model whose attribute is shared.
        name: name of the attribute.
        order: names of all children of ``owner`` in their original order, to restore it.
        skeleton: children of the module that was replaced, ``None`` entries kept: tells which
            parts of the shared module this task model really has.
    """

    owner: nn.Module
    name: str
    order: tuple[str, ...]
    skeleton: frozenset[str]

    @property
    def module(self) -> nn.Module:
        """The shared module in this place."""
        return getattr(self.owner, self.name)


def find_slots(task_model: nn.Module, backbone: nn.Module) -> list[tuple[Slot, nn.Module]]:
    """Returns the places of ``task_model`` to share, each with the backbone module to put there.

    A descendant of the backbone's own class is taken whole. Where there is none, children are
    matched by name and class (``T5ForConditionalGeneration`` has the parts of ``T5Model`` at its
    top), and children without a partner are searched in turn.
    """
    for owner in task_model.modules():
        for name, child in owner.named_children():
            if type(child) is type(backbone):
                return [(_slot(owner, name, child), backbone)]
    return _match_children(task_model, backbone)


def _match_children(owner: nn.Module, backbone: nn.Module) -> list[tuple[Slot, nn.Module]]:
    found: list[tuple[Slot, nn.Module]] = []
    for name, child in owner.named_children():
        if next(child.parameters(), None) is None:
            continue  # a dropout of the same name may have another rate: it stays with its head
        partner = getattr(backbone, name, None)
        if not isinstance(partner, nn.Module):
            found.extend(_match_children(child, backbone))
        elif type(partner) is type(child):
            found.append((_slot(owner, name, child), partner))
        else:
            found.extend(find_slots(child, partner))
    return found


def _slot(owner: nn.Module, name: str, child: nn.Module) -> Slot:
    kept = frozenset(n for n, module in child._modules.items() if module is not None)
    return Slot(owner=owner, name=name, order=tuple(owner._modules), skeleton=kept)


def check_shapes(slot: Slot, shared: nn.Module) -> None:
    """Checks that the shared module can stand in for the one in the slot.

    Raises:
        ValueError: a parameter of the slot's module is absent in ``shared`` or has another shape.
    """
    have = {name: tuple(p.shape) for name, p in shared.named_parameters(remove_duplicate=False)}
    for name, parameter in slot.module.named_parameters(remove_duplicate=False):
        if have.get(name) != tuple(parameter.shape):
            raise ValueError(
                f"{type(slot.owner).__name__}.{slot.name}: parameter {name} has shape "
                f"{tuple(parameter.shape)}, the shared backbone has {have.get(name)}. A head must "
                "not change the size of the backbone: remove that key from its config_updates."
            )


def hide(slots: Sequence[Slot], modules: Sequence[nn.Module]) -> None:
    """Puts the shared modules in their slots as plain attributes, out of ``children()``."""
    for slot, module in zip(slots, modules, strict=True):
        slot.owner._modules.pop(slot.name, None)
        slot.owner.__dict__[slot.name] = module


@contextmanager
def registered(slots: Sequence[Slot]) -> Iterator[None]:
    """Registers the shared modules as children for the duration of the context, without copies."""
    modules = [slot.module for slot in slots]
    for slot in slots:
        slot.owner._modules[slot.name] = slot.owner.__dict__.pop(slot.name)
    for slot in slots:
        for name in slot.order:  # state dicts and reprs come in the original order
            slot.owner._modules[name] = slot.owner._modules.pop(name)
    try:
        yield
    finally:
        hide(slots, modules)


def prune(backbone: nn.Module, slots: Sequence[Slot]) -> list[str]:
    """Drops the parts of the backbone that no task model has; returns their paths.

    ``AutoModel`` brings a pooler although only sequence classification has one, and a decoder
    although token classification with T5 has none: they would take memory and never train.
    """
    shared = {id(slot.module) for slot in slots}
    dropped = _drop_unshared(backbone, shared) if id(backbone) not in shared else []
    paths = {id(module): path for path, module in backbone.named_modules()}
    by_module: dict[int, list[Slot]] = {}
    for slot in slots:
        by_module.setdefault(id(slot.module), []).append(slot)
    for same in by_module.values():
        module = same[0].module
        wanted = frozenset[str]().union(*(slot.skeleton for slot in same))
        for name, child in list(module._modules.items()):
            if child is not None and name not in wanted:
                module._modules[name] = None  # as in the class built without this part
                path = paths[id(module)]
                dropped.append(f"{path}.{name}" if path else name)
    return dropped


def _drop_unshared(module: nn.Module, shared: set[int], prefix: str = "") -> list[str]:
    dropped: list[str] = []
    for name, child in list(module.named_children()):
        inside = {id(m) for m in child.modules()}
        if id(child) in shared:
            continue
        if inside & shared:
            dropped.extend(_drop_unshared(child, shared, f"{prefix}{name}."))
        elif next(child.parameters(), None) is not None:
            delattr(module, name)
            dropped.append(prefix + name)
    return dropped
