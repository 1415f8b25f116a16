"""The peer of `network.py`: DeepSpeed by itself, its model frozen before it is initialized.

The same model, rows a step, optimizer, precision and clipping as ours, in padded batches; the
configuration is that of `hf_trainer` with `overlap_comm`, which is for such links.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import DataCollatorWithPadding

from benchmarks.shaped.settings import FREEZING, model_of
from benchmarks.training.hf_trainer import DEEPSPEED
from benchmarks.training.workload import (
    MICRO_BATCH,
    RANKS,
    WEIGHT_DECAY,
    Encoded,
    Job,
    encode,
    load_model,
    load_tokenizer,
)
from dist_ft.engine.ds_setup import set_up_deepspeed

CLIP = 1.0


class DeepSpeedAlone:
    """Steps of DeepSpeed's own engine on this rank; the process group must be up."""

    def __init__(self, folder: Path, *, stage: int, share: str, steps: int) -> None:
        """Make the engine and the batches of so many steps."""
        set_up_deepspeed()
        import deepspeed

        data = encode(folder)
        job = Job(folder, 0, 1, model=model_of(folder, share))
        model = load_model(job, labels=len(data.labels))
        if FREEZING[share] != FREEZING["all"]:  # the embeddings, in what the peer is timed with
            model.bert.embeddings.requires_grad_(False)
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.trainable_share = sum(map(torch.numel, trainable)) / sum(
            map(torch.numel, model.parameters())
        )
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(trainable, lr=1e-5, weight_decay=WEIGHT_DECAY, fused=True),
            config=_config(stage),
            dist_init_required=False,
        )
        self.batches = _batches(data, steps=steps)

    def one(self, batch: dict[str, torch.Tensor]) -> None:
        """Run an optimizer step."""
        self.engine.backward(self.engine(**batch).loss)
        self.engine.step()

    def close(self) -> None:
        """Free what the engine holds."""
        self.engine.destroy()


def _config(stage: int) -> dict[str, Any]:
    return {
        **DEEPSPEED,
        "zero_optimization": {
            **DEEPSPEED["zero_optimization"],
            "stage": stage,
            "overlap_comm": True,
        },
        "gradient_clipping": CLIP,
        "train_batch_size": RANKS * MICRO_BATCH,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": 1,
    }


def _batches(data: Encoded, *, steps: int) -> list[dict[str, torch.Tensor]]:
    """Return this rank's rows of each step, padded to the longest of them."""
    pad = DataCollatorWithPadding(load_tokenizer())
    rank = dist.get_rank()
    starts = [RANKS * MICRO_BATCH * step + MICRO_BATCH * rank for step in range(steps)]
    return [dict(pad([dict(row) for row in data.train[s : s + MICRO_BATCH]])) for s in starts]
