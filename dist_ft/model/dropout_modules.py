"""Dropout modules of a model that run an operation of ours instead of torch's.

They stay instances of `nn.Dropout` with its `p` and `training`, read each time, and have neither
parameters nor a state: names, exports, copies and the hooks of ZeRO-3 are as before. Functions
that transformers calls (T5's attention weights, BART) are not modules and stay torch's.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from dist_ft.kernels.cpu_dropout import dropout

# Values below which torch's dropout is as quick: a Python function of a graph and eight small
# operations take as long as it needs for them (a head's inputs are often so few).
FEWEST = 1 << 14


class ByteDropout(nn.Dropout):
    """`nn.Dropout` that draws by `dist_ft.kernels.cpu_dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return `input` with elements dropped, in training mode; it keeps shape and type."""
        if not self.training or input.numel() < FEWEST:
            return super().forward(input)
        return dropout(input, p=self.p)


def find_dropouts(model: nn.Module) -> list[nn.Dropout]:
    """Return the modules that can run another dropout: torch's own, not in place."""
    return [
        m
        for m in model.modules()
        if type(m) is nn.Dropout and not m.inplace and "forward" not in vars(m)
    ]


def use_byte_dropout(modules: Iterable[nn.Dropout]) -> None:
    """Let `dist_ft.kernels.cpu_dropout` run these modules from now on."""
    for module in modules:
        # Of another class, not with another forward in it: so it can be copied and pickled.
        module.__class__ = ByteDropout
