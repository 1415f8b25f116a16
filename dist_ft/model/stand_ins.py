"""Modules that stand in for parts of a model which are left out of a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class _StandIn(nn.Module):
    """Has the attributes of another module, but neither its parameters nor its hooks."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        vars(self)["original"] = original  # not as a child, whose parameters would be found

    def __getattr__(self, name: str) -> Any:
        # Models ask their blocks for such things as the type of their attention.
        return getattr(vars(self)["original"], name)


class SkippedBlock(_StandIn):
    """Hands the hidden states that it gets on, or what `change` makes of them."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.set(others=None)

    def set(
        self,
        *,
        others: tuple[Any, ...] | None,
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> SkippedBlock:
        """Say what the next forwards return; return this block.

        Args:
            others: What comes after the hidden states; None returns these alone, in no tuple.
            change: Makes the hidden states that are returned from those that come in.
        """
        vars(self).update(others=others, change=change)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return hidden states as the block would, alone or in a tuple."""
        hidden = args[0] if args else kwargs["hidden_states"]
        change = vars(self)["change"]
        if change is not None:
            hidden = change(hidden)
        others = vars(self)["others"]
        return hidden if others is None else (hidden, *others)


class NoEmbedding(_StandIn):
    """Returns zeros that take no memory, in the shape of the embeddings."""

    def __init__(self, original: nn.Module, *, width: int) -> None:
        super().__init__(original)
        vars(self).update(like=None, width=width)

    def set(self, *, like: Tensor) -> NoEmbedding:
        """Say which type and device the zeros have; return this module."""
        vars(self)["like"] = like
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return zeros [rows, length, width], rows and length as in the first argument."""
        found = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() >= 2)
        rows, length = next(found).shape[:2]
        return vars(self)["like"].new_zeros(1).expand(rows, length, vars(self)["width"])


class Places:
    """Where modules hang below a root: found once, as looking for them walks the whole tree."""

    def __init__(self, root: nn.Module) -> None:
        """Look at everything below `root`, which must keep its modules."""
        self._found: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        for owner in root.modules():
            for name, child in owner._modules.items():
                if child is not None:
                    self._found.setdefault(child, []).append((owner, name))

    @contextmanager
    def swapped(self, stand_ins: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
        """Put stand-ins in the places of modules inside the context."""
        try:
            self._put(stand_ins)
            yield
        finally:
            self._put({module: module for module in stand_ins})

    def _put(self, modules: Mapping[nn.Module, nn.Module]) -> None:
        for module, instead in modules.items():
            for owner, name in self._found[module]:
                owner._modules[name] = instead
