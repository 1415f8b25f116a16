"""The peer: transformers' Trainer, as it comes, at its best settings, and with DeepSpeed ZeRO-2.

At its best settings: bf16 autocast, rows grouped by length, fused AdamW. What was tried besides and
is not used, as it is slower here: dataloader workers (they share the two cores), `torch.compile`
(every shape of a padded batch is compiled anew).

The Trainer multiplies the loss by the number of ranks when the model's forward takes keyword
arguments, expecting it to divide by `num_items_in_batch`; transformers' sequence classifiers take
them and return the plain mean (transformers 5.23, `Trainer.compute_loss`). So gradients before
clipping and the reported `eval_loss` are both twice as large on two ranks.
`average_tokens_across_devices=False` switches that off: every peer trains on the mean.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers import (
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.training.workload import (
    WEIGHT_DECAY,
    Clock,
    Encoded,
    Job,
    Outcome,
    load_model,
    load_tokenizer,
    score,
)

TUNED: dict[str, Any] = {"bf16": True, "train_sampling_strategy": "group_by_length"}
# After accelerate's documentation, without `overlap_comm`; the Trainer fills in what is "auto".
DEEPSPEED: dict[str, Any] = {
    "zero_optimization": {"stage": 2, "overlap_comm": False, "contiguous_gradients": True},
    "bf16": {"enabled": True},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "steps_per_print": 10**9,
}
# Name of a setting to the arguments that it changes.
SETTINGS: dict[str, dict[str, Any]] = {
    "Trainer": {},
    "Trainer, tuned": TUNED,
    "Trainer, tuned, DeepSpeed": {**TUNED, "deepspeed": DEEPSPEED},
}


def train_trainer(job: Job, data: Encoded, *, setting: str) -> Outcome:
    """Return what a run of the Trainer took; the process group must be up."""
    if "deepspeed" in SETTINGS[setting]:
        from dist_ft.engine.ds_setup import set_up_deepspeed

        set_up_deepspeed()  # gloo, nothing compiled, as for ours
    model = load_model(job, labels=len(data.labels))
    pad = DataCollatorWithPadding(load_tokenizer())
    clock = Clock(functools.partial(score, model, data.validation, pad=pad), every=job.score_every)
    trainer = Trainer(
        model=model,
        args=_arguments(job, setting=setting),
        train_dataset=data.train,  # pyright: ignore[reportArgumentType] - a list will do
        data_collator=pad,
        callbacks=[_Timed(clock)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.outcome()


def _arguments(job: Job, *, setting: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(job.folder / "trainer"),
        per_device_train_batch_size=job.micro_batch,
        num_train_epochs=job.epochs,
        learning_rate=job.lr,
        weight_decay=WEIGHT_DECAY,
        optim="adamw_torch_fused",
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=False,
        dataloader_pin_memory=False,
        seed=job.seed,
        **SETTINGS[setting],
    )


class _Timed(TrainerCallback):
    """Starts the clock when the model is wrapped and the first batch is about to be fetched."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start."""
        del args, state, control, kwargs
        self.clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count an optimizer step."""
        del args, control, kwargs
        self.clock.step_ended(is_last=state.global_step == state.max_steps)
