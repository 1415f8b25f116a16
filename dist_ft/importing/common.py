"""What the trainers built on Transformers' ``Trainer`` have in common."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dist_ft.importing.draft import Draft

_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
}
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


def take_optimizer(draft: Draft) -> None:
    """Translate optimizer, schedule and precision."""
    for key, path in (
        ("learning_rate", "optim.lr"),
        ("weight_decay", "optim.weight_decay"),
        ("max_grad_norm", "optim.max_grad_norm"),
        ("adam_epsilon", "optim.eps"),
    ):
        draft.move(key, path, float)
    betas = draft.take("adam_beta1"), draft.take("adam_beta2")
    if any(b is not None for b in betas):
        draft.put("optim.betas", [betas[0] or 0.9, betas[1] or 0.999])
    optimizer = draft.take("optim", "optimizer")
    if optimizer is not None and "adamw" not in str(optimizer):
        draft.note(f"optimizer {optimizer!r}: there is AdamW only")
    elif optimizer is not None and re.search("8bit|4bit|paged", str(optimizer)):
        draft.note(
            f"optimizer {optimizer!r}: AdamW with fp32 state is used, which needs more memory"
        )
    kind = draft.take("lr_scheduler_type", "lr_scheduler")
    if kind is not None:
        if kind not in _SCHEDULES:
            draft.note(f"learning-rate schedule {kind!r}: linear is used")
        draft.put("optim.schedule.type", _SCHEDULES.get(str(kind), "linear"))
    bf16, fp16 = draft.take("bf16"), draft.take("fp16")
    draft.put("engine.precision", "bf16" if bf16 else "fp16" if fp16 else "fp32")
    draft.ignore("tf32", "pure_bf16")


def take_length(draft: Draft, *, epochs: str) -> None:
    """Translate the length of the run, the warm-up and the batches.

    Args:
        draft: The recipe so far.
        epochs: The source's key for epochs.
    """
    steps, given = draft.take("max_steps"), draft.take(epochs)
    if steps is not None and int(steps) > 0:
        draft.put("train.max_duration", f"{int(steps)}step")
    else:
        draft.put("train.max_duration", f"{float(given or 3):g}ep")
    warmup, ratio = draft.take("warmup_steps"), draft.take("warmup_ratio")
    if warmup:
        draft.put("optim.schedule.warmup", f"{int(warmup)}step")
    elif ratio and steps is not None and int(steps) > 0:
        draft.put("optim.schedule.warmup", f"{round(float(ratio) * int(steps))}step")
    elif ratio:
        draft.put("optim.schedule.warmup", f"{float(ratio) * float(given or 3):g}ep")
    micro = int(draft.take("per_device_train_batch_size", "micro_batch_size") or 8)
    accumulation = int(draft.take("gradient_accumulation_steps") or 1)
    draft.put("train.micro_batch_size", micro)
    draft.put("train.global_batch_size", micro * accumulation * draft.ranks)
    if draft.ranks == 1:
        draft.note("global_batch_size is for one rank; give --ranks if the run had more")


def take_intervals(draft: Draft) -> None:
    """Translate evaluation, checkpoints, logging and what is common to all runs."""
    evaluates, saves = (
        draft.take("eval_strategy", "evaluation_strategy"),
        draft.take("save_strategy"),
    )
    every = draft.take("eval_steps")
    if evaluates == "epoch":
        draft.put("evaluation.every", "1ep")
    elif every is not None and float(every) >= 1 and evaluates != "no":
        draft.put("evaluation.every", f"{int(every)}step")
    every = draft.take("save_steps")
    if saves == "epoch":
        draft.put("checkpoint.every", "1ep")
    elif every is not None and float(every) >= 1 and saves != "no":
        draft.put("checkpoint.every", f"{int(every)}step")
    draft.move("save_total_limit", "checkpoint.keep_last", int)
    draft.move("logging_steps", "logging.every", lambda v: max(1, int(v)))
    draft.move("per_device_eval_batch_size", "evaluation.micro_batch_size", int)
    draft.move("seed", "seed", int)
    if draft.take("gradient_checkpointing"):
        draft.put("model.activation_checkpointing", "non_reentrant")
    draft.move("trust_remote_code", "model.trust_remote_code", bool)
    reports = draft.take("report_to")
    known = [
        t for t in ([reports] if isinstance(reports, str) else reports or ()) if t in _TRACKERS
    ]
    if known:
        draft.put("logging.trackers", known)
    draft.ignore("gradient_checkpointing_kwargs", "overwrite_output_dir", "do_train", "do_eval")
    draft.ignore("do_predict", "logging_strategy", "dataloader_num_workers", "ddp_timeout")
    draft.ignore("preprocessing_num_workers", "dataset_num_proc", "overwrite_cache", "plot_loss")
    draft.ignore("remove_unused_columns", "ddp_find_unused_parameters", "logging_dir", "strict")


def take_deepspeed(draft: Draft) -> None:
    """Translate the ZeRO stage of a DeepSpeed configuration, a file or a section."""
    given = draft.take("deepspeed")
    if not given:
        draft.put("engine.zero_stage", 0 if draft.ranks == 1 else 2)
        return
    body = _deepspeed(given, draft.folder)
    stage = body.get("zero_optimization", {}).get("stage") if body else None
    if stage is None:
        found = re.search(r"(?:zero|z)[_-]?(\d)", str(given))
        stage = int(found[1]) if found else 2
        draft.note(f"deepspeed {given!r} is not there to be read: zero_stage {stage} is a guess")
    draft.put("engine.zero_stage", int(stage))
    if body and (body["zero_optimization"].get("offload_optimizer") or {}).get("device") == "cpu":
        draft.put("engine.offload_optimizer", True)


def _deepspeed(given: Any, folder: Path) -> dict[str, Any] | None:
    if isinstance(given, dict):
        return given
    path = folder / str(given)
    return json.loads(path.read_text()) if path.is_file() else None


def run_name(output: Any, *, default: str) -> str:
    """Return a name that a recipe accepts, from the last part of an output folder."""
    words = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(str(output or default)).name).strip("-._")
    return words or default


def take_attention(value: Any) -> str | None:
    """Return the attention implementation of another trainer's word for it."""
    words = {"fa2": "flash_attention_2", "flash_attention_2": "flash_attention_2",
             "sdpa": "sdpa", "eager": "eager", "disabled": "eager", "auto": "auto"}  # fmt: skip
    return words.get(str(value)) if value is not None else None
