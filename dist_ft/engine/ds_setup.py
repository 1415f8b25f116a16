"""Settings of DeepSpeed that must be made before its first use in a process."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def set_up_deepspeed() -> None:
    """Choose the accelerator, keep DeepSpeed quiet, and build nothing.

    On a CPU DeepSpeed compiles a shared-memory extension in its first run, which takes minutes
    and a compiler and measured no faster than gloo on one host; gloo is used instead.
    """
    choose_accelerator()
    # Third-party deprecations that a user can do nothing about.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    with _no_stderr(), _absent("mlflow"):
        import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    _import_muon()
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # ZeRO-3 asks in every backward how many devices there are, for which `numactl` is started.
        accelerator: Any = deepspeed.get_accelerator()
        if "LOCAL_SIZE" not in os.environ:
            os.environ["LOCAL_SIZE"] = str(accelerator.device_count())


def choose_accelerator() -> None:
    """Tell DeepSpeed the device, so that whoever imports it is not warned of having no GPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def check_precision(precision: str, *, zero_stage: int) -> None:
    """Refuse fp16 where DeepSpeed does not run it; DeepSpeed has been set up.

    Raises:
        ValueError: Without partitions, or on a CPU that has no instructions for it.
    """
    if precision != "fp16":
        return
    if zero_stage == 0:
        raise ValueError(
            "engine.precision: fp16 needs zero_stage 1 or more, got 0: raise it, or use bf16"
        )
    import deepspeed

    accelerator: Any = deepspeed.get_accelerator()
    if not accelerator.is_fp16_supported():
        raise ValueError(
            f"engine.precision: fp16 does not run on this {accelerator.device_name()}, which has "
            "no instructions for it: use bf16 or fp32"
        )


def start_engine(module: nn.Module, *, optimizer: Any, config: dict[str, Any]) -> Any:
    """Return a DeepSpeed engine for what requires a gradient in `module`."""
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine


def _import_muon() -> None:
    """Import DeepSpeed's Muon, as every ZeRO optimizer does, without preparing to compile it.

    Nothing here steps with it, and its decorators load torch's whole compiler: most of a second of
    every rank's start.
    """
    from deepspeed.runtime import compiler

    compiles, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compiles


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Silence the linker that DeepSpeed runs at import to see which extensions it could build.

    An import that fails still raises.
    """
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


@contextmanager
def _absent(name: str) -> Iterator[None]:
    """Let a package look as if it were not installed, unless it has been imported already.

    DeepSpeed imports mlflow, if it is there, for an autotuner that nothing here runs: a second of
    every rank's start.
    """
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # pyright: ignore[reportArgumentType] - what makes an import fail
    try:
        yield
    finally:
        del sys.modules[name]
