"""The peer: Lightning with the finetuning-scheduler under DDP, at its best settings.

Its DeepSpeed strategy wants CUDA, and the scheduler refuses DeepSpeed (`freeze_correctness.py`
shows both). bf16 autocast, rows grouped by length, fused AdamW, as the tuned Trainer has them.
Optional: `pip install 'dist-ft[bench]'`; imported by name, so that this file can be read without.
"""

from __future__ import annotations

import functools
import importlib
import logging
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding
from transformers.trainer_pt_utils import DistributedLengthGroupedSampler

from benchmarks.freezing.lightning_peers import installed, load_scheduler, make_trainer
from benchmarks.training.workload import (
    RANKS,
    WEIGHT_DECAY,
    Clock,
    Encoded,
    Job,
    Outcome,
    load_model,
    load_tokenizer,
    score,
)

NAME = "Lightning + finetuning-scheduler, tuned"


def is_installed() -> bool:
    """Return whether the peer can run."""
    return installed("lightning") and installed("finetuning-scheduler")


def train_lightning(job: Job, data: Encoded) -> Outcome:
    """Return what a run of Lightning took; the process group must be up."""
    load_scheduler()
    logging.disable(logging.WARNING)  # in this process, which does nothing else
    model = load_model(job, labels=len(data.labels))
    pad = DataCollatorWithPadding(load_tokenizer())
    clock = Clock(functools.partial(score, model, data.validation, pad=pad), every=job.score_every)
    sampler = DistributedLengthGroupedSampler(
        job.micro_batch,
        num_replicas=RANKS,
        rank=dist.get_rank(),
        lengths=[len(row["input_ids"]) for row in data.train],
        seed=job.seed,
    )
    loader = DataLoader(data.train, job.micro_batch, sampler=sampler, collate_fn=pad)  # pyright: ignore
    steps = job.epochs * len(loader)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            folder,
            strategy="ddp",
            callbacks=[_static_schedule(model, epochs=job.epochs), _timed(clock, steps=steps)],
            devices=RANKS,
            max_epochs=job.epochs,
            precision="bf16-mixed",
            use_distributed_sampler=False,
            enable_checkpointing=False,
        )
        trainer.fit(_module(model, job=job, steps=steps), loader)
    return clock.outcome()


def _module(model: Any, *, job: Job, steps: int) -> Any:
    lightning: Any = importlib.import_module("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            del index
            return self.model(**batch).loss

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            # As the others clip; Lightning's own option refuses fused AdamW under autocast.
            del optimizer
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)

        def configure_optimizers(self) -> Any:
            trained = [p for p in self.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=job.lr, weight_decay=WEIGHT_DECAY, fused=True)
            decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: max(0.0, 1 - s / steps))
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": decay, "interval": "step"},
            }

    return Module()


def _static_schedule(model: Any, *, epochs: int) -> Any:
    """Return the scheduler's callback with one phase: what trains from the start."""
    package: Any = importlib.import_module("finetuning_scheduler")
    names = [f"model.{name}" for name, p in model.named_parameters() if p.requires_grad]
    return package.FinetuningScheduler(
        ft_schedule={0: {"params": names, "max_transition_epoch": epochs}},
        max_depth=0,
        epoch_transitions_only=True,
        restore_best=False,
        gen_ft_sched_only=False,
    )


def _timed(clock: Clock, *, steps: int) -> Any:
    callbacks: Any = importlib.import_module("lightning.pytorch.callbacks")

    class Timed(callbacks.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            del trainer, pl_module
            clock.start()

        def on_train_batch_end(self, *arguments: Any) -> None:
            del arguments
            clock.step_ended(is_last=clock.steps + 1 == steps)

    return Timed()
