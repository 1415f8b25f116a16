"""Model weights under every ZeRO stage: whole in stages 0-2, partitioned in stage 3."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ft.engine.base import StateSlice, StateSource
from dist_ft.engine.ds_state import read_master
from dist_ft.engine.element_counts import model_parameters
from dist_ft.engine.layout import Piece, fair_share


class FloatBuffers:
    """Keeps floating-point buffers as they are when the weights are cast.

    Rotary frequencies lose positions in bf16; transformers keeps them in fp32 whatever the
    weights are, and so does an exported model.
    """

    def __init__(self, module: nn.Module) -> None:
        """Remember the buffers of `module` and everything below it."""
        self._buffers = [
            (m, name, buffer)
            for m in module.modules()
            for name, buffer in m._buffers.items()
            if buffer is not None and buffer.is_floating_point()
        ]

    def restore(self) -> None:
        """Put them back."""
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer


class WeightAccess:
    """Reads and writes a module's weights by name, whatever ZeRO has done to them."""

    def __init__(self, module: nn.Module, *, zero_stage: int) -> None:
        """Look at `module`."""
        self._module = module
        self._stage = zero_stage
        self._parameters = model_parameters(module)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the current Parameter objects by name."""
        return self._parameters

    def refresh(self) -> None:
        """Look up the Parameter objects again after they were replaced."""
        self._parameters = model_parameters(self._module)

    def partition(self, config: dict[str, Any]) -> None:
        """Partition the parameters over the ranks (ZeRO-3) before the engine is built."""
        import deepspeed

        deepspeed.zero.Init(module=self._module, config_dict_or_path=config)
        self.refresh()

    def slices(self) -> list[StateSlice]:
        """Return this rank's share of the weights, as views."""
        rank, world = dist.get_rank(), dist.get_world_size()
        if self._stage == 3:
            return [
                StateSlice(name, start, {"weight": part})
                for name, p in self._parameters.items()
                for start, part in self._partition(p, rank)
            ]
        sizes = [(name, p.numel()) for name, p in self._parameters.items()]
        return [
            StateSlice(
                name,
                start,
                {"weight": self._parameters[name].detach().view(-1)[start : start + length]},
            )
            for name, start, length in fair_share(sizes, rank=rank, world_size=world)
        ]

    def _partition(self, parameter: Any, rank: int) -> list[tuple[int, Tensor]]:
        part = parameter.ds_tensor.detach().view(-1)
        start = rank * part.numel()
        length = max(0, min(part.numel(), parameter.ds_numel - start))
        return [(start, part[:length])] if length else []

    @torch.no_grad()
    def load(self, source: StateSource) -> None:
        """Overwrite every weight with the saved one.

        Raises:
            ValueError: If the checkpoint lacks a parameter.
        """
        for name, parameter in self._parameters.items():
            if self._stage != 3:
                parameter.view(-1).copy_(read_master(source, Piece(name, 0, parameter.numel(), 0)))
                continue
            for start, part in self._partition(parameter, dist.get_rank()):
                part.copy_(read_master(source, Piece(name, start, part.numel(), 0)))
            zero: Any = parameter
            if zero.ds_status.name == "AVAILABLE":  # small ones stay whole on every rank
                parameter.view(-1).copy_(read_master(source, Piece(name, 0, zero.ds_numel, 0)))

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        """Overwrite what this rank holds of a parameter by its part of a whole one, flat."""
        parameter: Any = self._parameters[name]
        if self._stage != 3:
            parameter.view(-1).copy_(value)
            return
        for start, part in self._partition(parameter, dist.get_rank()):
            part.copy_(value[start : start + part.numel()])

    @torch.no_grad()
    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """Return what this rank holds of the weights, each tensor with a copy of it."""
        zero: list[Any] = list(self._parameters.values())
        held = [p.ds_tensor.data if self._stage == 3 else p.data for p in zero]
        return [(tensor, tensor.clone()) for tensor in held]

    @torch.no_grad()
    def whole(self, name: str) -> Tensor:
        """Return a whole parameter on every rank; all ranks must ask for the same."""
        parameter = self._parameters[name]
        if self._stage != 3:
            return parameter.detach()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    @torch.no_grad()
    def gather(self) -> dict[str, Tensor]:
        """Return whole weights by name on the host of rank 0; elsewhere an empty dict."""
        import deepspeed

        main = dist.get_rank() == 0
        weights: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            if self._stage == 3:
                with deepspeed.zero.GatheredParameters([parameter]):
                    if main:
                        weights[name] = parameter.detach().cpu().clone()
            elif main:
                weights[name] = parameter.detach().cpu().clone()
        return weights
