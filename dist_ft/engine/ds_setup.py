"""Settings of DeepSpeed that must be made before its first use in a process."""

from __future__ import annotations

import logging
import os
import warnings

import torch


def set_up_deepspeed() -> None:
    """Choose the accelerator, keep DeepSpeed quiet, and build nothing.

    On a CPU DeepSpeed compiles a shared-memory extension in its first run, which takes minutes
    and a compiler and measured no faster than gloo on one host; gloo is used instead.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Third-party deprecations that a user can do nothing about.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
