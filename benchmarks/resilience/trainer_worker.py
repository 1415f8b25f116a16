"""transformers' Trainer with its own checkpoints, run by torchrun; see `torchrun.py`.

It goes on as its documentation says: from the checkpoint that `get_last_checkpoint` names, which is
the one with the highest number, whole or not.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

SAVE_EVERY = 20


def make_trainer(folder: Path, *, save_every: int, steps: int, callbacks: list[Any]) -> Any:
    """Return a Trainer of a small BERT on random rows."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=512, max_position_embeddings=64,
    )  # fmt: skip
    rows = [{"input_ids": torch.randint(100, (16,)), "labels": i % 2} for i in range(512)]
    settings = TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=steps, save_steps=save_every,
        save_total_limit=2, per_device_train_batch_size=8, use_cpu=True, report_to=[],
        logging_strategy="no", disable_tqdm=True, dataloader_num_workers=0,
    )  # fmt: skip
    model: Any = BertForSequenceClassification(config)
    return Trainer(model=model, args=settings, train_dataset=rows, callbacks=callbacks)  # pyright: ignore[reportArgumentType]


def work(folder: Path, *, save_every: int = SAVE_EVERY, pause_s: float = 0.02) -> None:
    """Train without end."""
    from transformers import TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint

    class Tell(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            del args, control, kwargs
            time.sleep(pause_s)
            if state.is_world_process_zero:
                with (folder / "steps.txt").open("a") as file:
                    file.write(f"{state.global_step}\n")

    trainer = make_trainer(folder, save_every=save_every, steps=10**6, callbacks=[Tell()])
    root = Path(trainer.args.output_dir)
    newest = get_last_checkpoint(str(root)) if root.is_dir() else None
    trainer.train(resume_from_checkpoint=newest)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
