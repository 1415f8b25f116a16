"""Takes a module out of a DeepSpeed engine again, as if it had never been in one."""

from __future__ import annotations

import atexit
import gc
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from dist_ft.engine.heap import trim_heap


class ModuleSnapshot:
    """Remembers a module tree before DeepSpeed touches it, and restores it afterwards.

    ``engine.destroy()`` leaves forward hooks on modules and attributes on modules and parameters,
    each of which keeps the whole old engine alive. Rather than a list of DeepSpeed's private
    names, which an upgrade would silently outdate, everything that was not there before is
    removed.
    """

    def __init__(self, module: nn.Module) -> None:
        """Remember `module` and everything below it."""
        self._modules = {m: _copy_dict(m) for m in module.modules()}
        self._parameters = {p: set(vars(p)) for p in module.parameters()}

    def restore(self, *, fresh_parameters: bool) -> None:
        """Undo what was added since.

        Args:
            fresh_parameters: Put new Parameter objects, with storage of their own, in the place
                of the old ones. That sheds gradient hooks and views of DeepSpeed's flat buffers
                for certain; stage 3 keeps its partitioned parameters instead.
        """
        renewed: dict[int, nn.Parameter] = {}
        old: list[nn.Parameter] = []
        for module, saved in self._modules.items():
            _restore_dict(module, saved)
            for name, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                if not fresh_parameters:
                    self._strip(parameter)
                    continue
                if id(parameter) not in renewed:
                    renewed[id(parameter)] = nn.Parameter(
                        _own_storage(parameter), requires_grad=False
                    )
                module._parameters[name] = renewed[id(parameter)]
                old.append(parameter)
        for parameter in old:
            # DeepSpeed's attributes tie the parameter to the engine in a cycle, which is not
            # collected once the parameter is exempt from collection.
            self._strip(parameter)
        if fresh_parameters:
            self._parameters = {p: set(vars(p)) for p in renewed.values()}
            self._modules = {m: _copy_dict(m) for m in self._modules}

    def _strip(self, parameter: nn.Parameter) -> None:
        known = self._parameters.get(parameter, set())
        for name in set(vars(parameter)) - known:
            delattr(parameter, name)
        parameter.grad = None
        partition: Any = getattr(parameter, "ds_tensor", None)
        if partition is not None:
            partition.data = _own_storage(partition)


def exempt_from_collection() -> None:
    """Take what exists now out of later collections; called once, before the first engine.

    A full collection walks every object of the process, which took most of a phase change.
    Repeating this after each change would exempt remains of old engines too: memory then grew.
    """
    gc.collect()
    gc.freeze()
    # A process that ends while an engine is open, stopped or by an error, would leave all this out
    # of its last collection, too, and triton's bindings (nanobind) tell thirty lines of leaks.
    atexit.register(gc.unfreeze)


def include_in_collection() -> None:
    """Collect what the last engine left, and undo `exempt_from_collection`."""
    collect_garbage()  # before: to go through all else takes half a second and finds nothing
    gc.unfreeze()
    atexit.unregister(gc.unfreeze)


def destroy_engine(engine: Any, *, zero_stage: int) -> None:
    """Take a DeepSpeed engine down; in stage 3, its parameters stay partitioned."""
    if zero_stage == 3:
        engine.optimizer._partition_all_parameters()
        engine.empty_partition_cache()
    engine.destroy()


def collect_garbage() -> None:
    """Free the old engine's reference cycles now, not at some later allocation."""
    gc.collect()
    trim_heap()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _own_storage(tensor: Tensor) -> Tensor:
    data = tensor.detach()
    if data.untyped_storage().nbytes() == data.numel() * data.element_size():
        return data
    return data.clone()


def _copy_dict(module: nn.Module) -> dict[str, Any]:
    return {
        key: value.copy() if isinstance(value, (dict, OrderedDict)) and "_hooks" in key else value
        for key, value in vars(module).items()
    }


def _restore_dict(module: nn.Module, saved: dict[str, Any]) -> None:
    current = vars(module)
    for key in set(current) - set(saved):
        del current[key]
    for key, value in saved.items():
        if key == "_parameters":
            _restore_parameters(module, value)
        elif "_hooks" in key and isinstance(value, dict):
            current[key] = value.copy()


def _restore_parameters(module: nn.Module, saved: dict[str, nn.Parameter | None]) -> None:
    # Stage 3 wraps the dictionary in one that gathers on access; the parameters are the same.
    vars(module)["_parameters"] = saved
