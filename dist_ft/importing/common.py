"""What the trainers built on Transformers' ``Trainer`` have in common."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_ft.importing.defaults import Defaults
from dist_ft.importing.draft import Draft
from dist_ft.importing.values import as_names, as_text, as_whole
from dist_ft.recipe.errors import TO_FILL

_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
}
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
_STRATEGIES = (None, "no", "steps", "epoch")


@dataclass(frozen=True)
class Length:
    """How long the run is.

    Attributes:
        epochs: Over the rows.
        steps: Counts instead of the epochs; None if they count.
    """

    epochs: float
    steps: int | None = None

    def share(self, share: float) -> str:
        """Return a share of the run as a duration; steps are rounded up, as Transformers does."""
        if self.steps is not None:
            return f"{math.ceil(share * self.steps)}step"
        return f"{share * self.epochs:g}ep"

    def duration(self, steps: float) -> str:
        """Return steps as a duration; below 1 they are a share of the run."""
        return self.share(steps) if 0 < steps < 1 else f"{math.ceil(steps)}step"


def take_optimizer(draft: Draft, *, theirs: Defaults, length: Length) -> None:
    """Translate optimizer, schedule, warm-up and precision."""
    rate = draft.number("learning_rate")
    rate = theirs.lr if rate is None else rate
    if rate is None:
        draft.note("learning_rate: the file gives none: fill in optim.lr")
    draft.put("optim.lr", TO_FILL if rate is None else rate)
    for key, default, path in (
        ("weight_decay", theirs.weight_decay, "optim.weight_decay"),
        ("max_grad_norm", theirs.max_grad_norm, "optim.max_grad_norm"),
        ("adam_epsilon", theirs.eps, "optim.eps"),
    ):
        given = draft.number(key)
        draft.put(path, default if given is None else given)
    betas = draft.number("adam_beta1"), draft.number("adam_beta2")
    pairs = zip(betas, theirs.betas, strict=True)
    draft.put("optim.betas", [default if given is None else given for given, default in pairs])
    _take_kind(draft)
    _take_schedule(draft, theirs=theirs, length=length)
    _take_precision(draft, theirs=theirs)


def _take_kind(draft: Draft) -> None:
    optimizer = draft.text("optim", "optimizer")
    if optimizer is not None and "adamw" not in optimizer:
        draft.note(f"optimizer {optimizer!r}: there is AdamW only")
    elif optimizer is not None and re.search("8bit|4bit|paged", optimizer):
        draft.note(
            f"optimizer {optimizer!r}: AdamW with fp32 state is used, which needs more memory"
        )


def _take_schedule(draft: Draft, *, theirs: Defaults, length: Length) -> None:
    kind = draft.text("lr_scheduler_type", "lr_scheduler") or theirs.schedule
    if kind not in _SCHEDULES:
        draft.note(f"learning-rate schedule {kind!r}: linear is used")
    draft.put("optim.schedule.type", _SCHEDULES.get(kind, "linear"))
    steps, ratio = draft.number("warmup_steps"), draft.number("warmup_ratio")
    if kind == "constant":
        return  # there it has no warm-up, whatever the keys say
    if steps:
        draft.put("optim.schedule.warmup", length.duration(steps))
    elif ratio:
        draft.put("optim.schedule.warmup", length.share(ratio))
    elif steps is None and ratio is None and theirs.warmup_ratio:
        _put_own_warmup(draft, theirs=theirs, length=length)


def _put_own_warmup(draft: Draft, *, theirs: Defaults, length: Length) -> None:
    share, most = theirs.warmup_ratio, theirs.most_warmup_steps
    if length.steps is not None and most is not None and share * length.steps > most:
        draft.put("optim.schedule.warmup", f"{most}step")
        return
    draft.put("optim.schedule.warmup", length.share(share))
    if length.steps is None and most is not None:
        draft.note(
            f"warm-up: the file says nothing, which is {share:.0%} of the run there and at most "
            f"{most} steps: lower optim.schedule.warmup in a long run"
        )


def _take_precision(draft: Draft, *, theirs: Defaults) -> None:
    is_given = draft.source.get("bf16") is not None
    bf16, fp16, pure = draft.flag("bf16"), draft.flag("fp16"), draft.flag("pure_bf16")
    if pure:
        draft.note("pure_bf16: the master weights are fp32 here, which needs more memory")
    if bf16 or pure:
        draft.put("engine.precision", "bf16")
    elif fp16:
        draft.put("engine.precision", "fp16")
    elif is_given or theirs.precision == "fp32":
        draft.put("engine.precision", "fp32")
    else:
        draft.put("engine.precision", theirs.precision)
        draft.note(f"bf16: the file says nothing, which is {theirs.precision} there where it works")
    draft.ignore("tf32")


def take_length(draft: Draft, *, epochs: str, theirs: Defaults) -> Length:
    """Translate the length of the run and the batches; return the length.

    Args:
        draft: The recipe so far.
        epochs: The source's key for epochs.
        theirs: What counts where the source says nothing.
    """
    steps, given = draft.whole("max_steps"), draft.number(epochs)
    length = Length(
        epochs=theirs.epochs if given is None else given,
        steps=steps if steps is not None and steps > 0 else None,
    )
    draft.put("train.max_duration", length.share(1))
    micro = draft.whole("per_device_train_batch_size", "micro_batch_size")
    micro = theirs.micro_batch if micro is None else micro
    accumulation = draft.whole("gradient_accumulation_steps")
    accumulation = 1 if accumulation is None else accumulation
    draft.put("train.micro_batch_size", micro)
    draft.put("train.global_batch_size", micro * accumulation * draft.ranks)
    if draft.ranks == 1:
        draft.note("global_batch_size is for one rank; give --ranks if the run had more")
    return length


def take_intervals(draft: Draft, *, length: Length) -> None:
    """Translate evaluation, checkpoints, logging and what is common to all runs."""
    evaluates = draft.take_as(_as_strategy, "eval_strategy", "evaluation_strategy")
    _take_interval(draft, "eval_steps", "evaluation.every", strategy=evaluates, length=length)
    saves = draft.take_as(_as_strategy, "save_strategy")
    _take_interval(draft, "save_steps", "checkpoint.every", strategy=saves, length=length)
    draft.move("save_total_limit", "checkpoint.keep_last", as_whole)
    _take_logging(draft, length)
    draft.move("per_device_eval_batch_size", "evaluation.micro_batch_size", as_whole)
    draft.move("seed", "seed", as_whole)
    if draft.flag("gradient_checkpointing"):
        draft.put("model.activation_checkpointing", "non_reentrant")
    if draft.flag("trust_remote_code"):
        draft.put("model.trust_remote_code", True)
    draft.ignore("gradient_checkpointing_kwargs", "overwrite_output_dir", "do_train", "do_eval")
    draft.ignore("do_predict", "logging_strategy", "dataloader_num_workers", "ddp_timeout")
    draft.ignore("preprocessing_num_workers", "dataset_num_proc", "overwrite_cache", "plot_loss")
    draft.ignore("remove_unused_columns", "ddp_find_unused_parameters", "logging_dir", "strict")


def _as_strategy(value: Any, key: str) -> str:
    return "no" if value is False else as_text(value, key)  # YAML reads no as false


def _take_interval(
    draft: Draft, key: str, path: str, *, strategy: str | None, length: Length
) -> None:
    every = draft.number(key)
    if strategy not in _STRATEGIES:
        draft.note(f"{key}: the strategy {strategy!r} is not translated: set {path}")
    if strategy == "epoch":
        draft.put(path, "1ep")
    elif every and strategy != "no":
        draft.put(path, length.duration(every))


def _take_logging(draft: Draft, length: Length) -> None:
    every = draft.number("logging_steps")
    if every is not None and 0 < every < 1 and length.steps is None:
        draft.note(f"not translated: logging_steps = {every:g}: give logging.every in steps")
    elif every is not None:
        steps = every * (length.steps or 1) if 0 < every < 1 else every
        draft.put("logging.every", max(1, math.ceil(steps)))
    reports = draft.take_as(as_names, "report_to") or []
    known = [name for name in reports if name in _TRACKERS]
    if known:
        draft.put("logging.trackers", known)
    for name in reports:
        if name not in (*_TRACKERS, "none"):
            draft.note(f"not translated: report_to = {name!r}")


def run_name(output: str | None, *, default: str) -> str:
    """Return a name that a recipe accepts, from the last part of an output folder."""
    words = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(output or default).name).strip("-._")
    return words or default


def take_attention(draft: Draft, key: str) -> None:
    """Translate the attention implementation."""
    words = {"fa2": "flash_attention_2", "flash_attention_2": "flash_attention_2",
             "sdpa": "sdpa", "eager": "eager", "disabled": "eager", "auto": "auto"}  # fmt: skip
    given = draft.text(key)
    if given is not None and given not in words:
        draft.note(f"not translated: {key} = {given!r}")
    draft.put("model.attention", words.get(given or ""))
