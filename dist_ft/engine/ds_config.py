"""The DeepSpeed configuration that follows from a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dist_ft.engine.base import EngineOptions

# What a recipe does not say and a user's JSON may: sizes that trade memory for fewer messages.
DEFAULT_BUCKET = 50_000_000
# One sub-group for each parameter group: layer groups are small enough to be updated whole, and
# a group's partition is then a single vector in every stage.
ONE_SUB_GROUP = 10**14


@dataclass(frozen=True)
class DeepSpeedOptions:
    """Where the state lives.

    Attributes:
        zero_stage: 0 replicates, 1 partitions the optimizer, 2 the gradients too, 3 the weights.
        offload_optimizer: Keep masters and moments in host memory.
        micro_batch_size: Rows in a micro-batch.
        gradient_accumulation_steps: Micro-batches of a rank in a step.
        base: The user's own DeepSpeed JSON, already checked against the recipe.
    """

    zero_stage: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    offload_optimizer: bool = False
    base: Mapping[str, Any] | None = None


def build_ds_config(
    options: EngineOptions, *, deepspeed: DeepSpeedOptions, trainable_elements: int
) -> dict[str, Any]:
    """Return the configuration for ``deepspeed.initialize``.

    Args:
        options: Precision and clipping.
        deepspeed: Partitioning.
        trainable_elements: Parameters that train; no communication buffer needs to be larger.
    """
    config: dict[str, Any] = dict(deepspeed.base or {})
    bucket = max(1024, min(DEFAULT_BUCKET, trainable_elements + trainable_elements % 2))
    zero: dict[str, Any] = {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "contiguous_gradients": True,
        "overlap_comm": False,
        **config.get("zero_optimization", {}),
        "stage": deepspeed.zero_stage,
        "round_robin_gradients": False,
    }
    # Where a partition's elements lie must follow from the sizes; it is DeepSpeed's default, too.
    zero.pop("parameter_alignment", None)
    if deepspeed.zero_stage == 3:
        zero["sub_group_size"] = ONE_SUB_GROUP
    else:
        # What DeepSpeed calls so is an all-reduce between two more copies of every gradient; see
        # `dist_ft.engine.ds_gradients` for CPUs.
        zero.setdefault("reduce_scatter", False)
        # The loss is a mean over the global batch already: one pass over the gradients less.
        config["gradient_allreduce_op"] = "sum"
    if deepspeed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", **zero.get("offload_optimizer", {})}
    config |= {
        "train_micro_batch_size_per_gpu": deepspeed.micro_batch_size,
        "gradient_accumulation_steps": deepspeed.gradient_accumulation_steps,
        "gradient_clipping": 0.0 if clips_itself(options, deepspeed) else options.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        # It waits for the device twice a step.
        "timers": {"throughput": {"enabled": False}},
    }
    # It follows, and where micro-batches differ in rows it has no other two numbers to agree with.
    config.pop("train_batch_size", None)
    if options.precision != "fp32":
        config[options.precision] = {
            **config.get(options.precision, {}),
            "enabled": True,
        }
    if options.precision == "bf16":  # a step of infinite gradients is to be refused, not taken
        config["bf16"]["check_grad_overflow"] = True
    return config


def averages(deepspeed: DeepSpeedOptions) -> bool:
    """Return whether DeepSpeed takes the mean of the ranks' gradients, and not their sum."""
    return deepspeed.zero_stage == 3


def clips_itself(options: EngineOptions, deepspeed: DeepSpeedOptions) -> bool:
    """Return whether the gradients are whole and ours to clip (DeepSpeed drops the norm there)."""
    return deepspeed.zero_stage == 0 and options.precision == "fp32"
