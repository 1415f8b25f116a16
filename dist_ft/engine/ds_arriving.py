"""Weights on their way: the next forward pass waits for a block's when it comes to the block.

After a step of ZeRO 1 or 2 every rank sends the weights that it has updated to all others. Nothing
needs them before the next forward pass, and that needs them block after block.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class ArrivingWeights:
    """What the ranks are sending each other, in the order in which it was begun.

    Whoever reads weights must `settle` first. A forward pass may leave that to the blocks that
    it calls: from `watch` on, they wait for theirs before they run, once they have been seen to be
    called.
    """

    _pending: deque[tuple[frozenset[str], Callable[[], None]]] = field(default_factory=deque)
    _blocks: frozenset[str] = frozenset()
    _called: set[str] = field(default_factory=set)

    def in_order(self, indices: Iterable[int], layer_groups: Sequence[str]) -> list[int]:
        """Return parameter groups in the order in which a forward pass waits for them.

        Args:
            indices: The groups, bottom to top, heads last.
            layer_groups: The layer group of every parameter group.
        """
        return sorted(indices, key=lambda index: layer_groups[index] in self._blocks)

    def add(self, layer_groups: Iterable[str], finish: Callable[[], None]) -> None:
        """Remember an exchange of weights of some layer groups, and what waits for its end."""
        self._pending.append((frozenset(layer_groups), finish))

    def settle(self) -> None:
        """Wait until all weights are there.

        Raises:
            RuntimeError: If a rank is gone, or the group's timeout has passed.
        """
        self.take(len(self._pending))

    def take(self, count: int) -> None:
        """Wait for the first `count` exchanges."""
        for _ in range(count):
            groups, finish = self._pending[0]
            try:
                finish()
            except RuntimeError as error:
                # Whoever reads weights after this must not find them half written.
                self._pending[0] = groups, functools.partial(_raise, error)
                raise
            self._pending.popleft()

    def give_up(self) -> None:
        """Wait for what can still arrive; nobody will read the weights any more."""
        with contextlib.suppress(RuntimeError):
            self.settle()
        self._pending.clear()

    def settle_before_forward(self) -> None:
        """Wait for all weights but those that blocks wait for themselves."""
        self._wait(lambda groups: not groups <= self._called)

    def watch(self, blocks: Mapping[str, nn.Module]) -> None:
        """Let blocks wait for their weights.

        Args:
            blocks: By layer group. Nothing else uses their weights before they are called. The
                hooks are the modules' own, and go when DeepSpeed's do.
        """
        self._called.clear()
        self._blocks = frozenset(blocks)
        for name, block in blocks.items():
            block.register_forward_pre_hook(self._waiting(name))

    def _waiting(self, name: str) -> Callable[[nn.Module, Any], None]:
        def wait(module: nn.Module, arguments: Any) -> None:
            del module, arguments
            self._called.add(name)
            if self._pending:
                self._wait(lambda groups: name in groups)

        return wait

    def _wait(self, concerns: Callable[[frozenset[str]], bool]) -> None:
        """Wait for all exchanges up to the last one that `concerns` is true of."""
        last = max((i for i, (g, _) in enumerate(self._pending) if concerns(g)), default=-1)
        self.take(last + 1)


def _raise(error: RuntimeError) -> None:
    raise error
