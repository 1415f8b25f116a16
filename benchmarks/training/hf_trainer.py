"""The peer: transformers' Trainer on two ranks, as it comes or at its best settings.

Run by ``torch.distributed.run``; rank 0 writes a JSON file with seconds and loss.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)


def main() -> None:
    """Train and write what it took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--tuned", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    trainer = _trainer(options)
    result = trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    if os.environ["RANK"] == "0":
        body = {"seconds": result.metrics["train_runtime"], "loss": loss}
        options.out.write_text(json.dumps(body))


def _trainer(options: argparse.Namespace) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    files = {s: str(options.data / f"{s}.jsonl") for s in ("train", "validation")}
    names = sorted(
        {json.loads(line)["label"] for line in Path(files["train"]).read_text().splitlines()}
    )

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(rows["text"], truncation=True, max_length=128)
        return {**encoded, "labels": [names.index(label) for label in rows["label"]]}

    data: Any = load_dataset("json", data_files=files)
    data = data.map(encode, batched=True, remove_columns=["text", "label"])
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(names))
    if options.depth:
        frozen = [model.bert.embeddings, *model.bert.encoder.layer[: options.depth]]
        for module in frozen:
            module.requires_grad_(False)
    tuned: dict[str, Any] = {}
    if options.tuned:
        tuned = {"bf16": True, "train_sampling_strategy": "group_by_length"}
    arguments = TrainingArguments(
        output_dir=str(options.out.with_suffix(".run")),
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        num_train_epochs=options.epochs,
        learning_rate=1e-4,
        weight_decay=0.01,
        optim="adamw_torch_fused",
        save_strategy="no",
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
        seed=0,
        **tuned,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    main()
