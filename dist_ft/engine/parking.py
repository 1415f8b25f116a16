"""Takes a frozen prefix's weights out of the device's memory while no step computes it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import IO, Any

import torch
from torch import Tensor, nn

from dist_ft.engine.trunk_passes import TrunkPasses

# Steps in a row that must have done without the prefix before it is parked.
_QUIET_STEPS = 8

log = logging.getLogger("dist_ft")


@dataclass
class ParkedPrefix:
    """The weights that only a frozen prefix uses: on the device, or parked.

    A GPU's go to the host's memory, a CPU's to an unnamed file. They come back for whatever needs
    them: an evaluation, a checkpoint, a phase change, a row that has to be computed.

    Attributes:
        parameters: returns the parameters that may go; None never parks any.
        parked_bytes: bytes of the device that parking has freed now.
    """

    parameters: Callable[[], Iterable[nn.Parameter]] | None = None
    parked_bytes: int = 0
    _away: list[tuple[nn.Parameter, torch.Size, Tensor | None]] = field(default_factory=list)
    _file: IO[bytes] | None = None
    _quiet: int = 0

    @classmethod
    def of(cls, passes: TrunkPasses, module: nn.Module, *, can_go: bool) -> ParkedPrefix:
        """Return what parks the prefix of `module`, if `passes` wants it.

        Rows that are computed after all, in the middle of a step, bring it back.

        Args:
            passes: How rows go through the model.
            module: The model.
            can_go: Whether weights have storage of their own: not in ZeRO-3, where a rank has only
                its share, and not where an engine keeps all that ever train in one buffer.
        """
        if not (can_go and passes.drop_prefix):
            return cls()
        made = cls(lambda: only_used_in(module, passes.left_out()))
        passes.before_prefix = made.bring_back
        return made

    def settle(self, *, needed: bool) -> None:
        """Have the prefix where a step wants it.

        Args:
            needed: whether the step computes it.
        """
        if self.parameters is None:
            return
        if needed:
            self.bring_back()
            return
        self._quiet += 1
        if self._quiet == _QUIET_STEPS:
            self._park(self.parameters())

    @torch.no_grad()
    def _park(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            data = parameter.data
            if data.untyped_storage().nbytes() != data.nbytes:
                continue  # a view of what others use, too: nothing would be freed
            copy = None
            if data.device.type == "cpu":
                if not self._written(data):
                    return
            else:
                copy = data.to("cpu")
            self._away.append((parameter, data.shape, copy))
            self.parked_bytes += data.nbytes
            parameter.data = data.new_empty(0)

    def _written(self, data: Tensor) -> bool:
        """Write a weight into the file; return whether it is there, on a disk that may be full."""
        try:
            # Unbuffered: memory is given up only for what has been written.
            self._file = self._file or tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - kept
            _all_of(_bytes_of(data), self._file.write)
        except OSError as error:
            log.warning("the frozen prefix stays in memory: %s", error)
            return False
        return True

    @torch.no_grad()
    def bring_back(self) -> None:
        """Put all weights back into the device's memory."""
        self._quiet = 0
        if self._file is not None:
            self._file.seek(0)
        for parameter, shape, copy in self._away:
            data = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
            if copy is not None:
                data.copy_(copy)
            else:
                raw: Any = self._file
                _all_of(_bytes_of(data), raw.readinto)
            parameter.data = data
        if self._file is not None:
            self._file.close()
        self._away, self._file, self.parked_bytes = [], None, 0


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _all_of(content: memoryview, transfer: Callable[[memoryview], int]) -> None:
    """Read or write all of `content`; the system takes up to 2 GiB at once."""
    done = 0
    while done < len(content):
        moved = transfer(content[done:])
        if not moved:
            raise OSError("the file of the frozen prefix was cut short")
        done += moved


def only_used_in(root: nn.Module, skipped: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters of modules that no other module below `root` uses.

    Args:
        root: the whole model.
        skipped: modules that a forward leaves out, with everything below them.
    """
    inside = dict.fromkeys(part for module in skipped for part in module.modules())
    others = {
        id(p)
        for m in root.modules()
        if m not in inside
        for p in m._parameters.values()
        if p is not None
    }
    found: dict[int, nn.Parameter] = {}
    for module in inside:
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in others:
                found[id(parameter)] = parameter
    return list(found.values())
