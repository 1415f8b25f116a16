"""What the other trainers take where a file says nothing; a recipe's own defaults differ."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Defaults:
    """The values of one trainer's keys that are left out.

    Attributes:
        lr: None if the trainer wants it given.
        schedule: Of the learning rate, in the trainer's words.
        epochs: Length of the run.
        micro_batch: Rows of one rank.
        warmup_ratio: Share of the run.
        most_warmup_steps: What that share never goes beyond; None without a limit.
        precision: Of the forward pass.
        length: Tokens of a row.
        weight_decay: Of AdamW, as the following.
        max_grad_norm: Where gradients are clipped.
        betas: Of the moments.
        eps: Beside the second moment.
    """

    lr: float | None
    schedule: str
    epochs: float
    micro_batch: int
    warmup_ratio: float = 0.0
    most_warmup_steps: int | None = None
    precision: str = "fp32"
    length: int = 128
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


TRAINER = Defaults(lr=5e-5, schedule="linear", epochs=3, micro_batch=8)
LLAMA_FACTORY = Defaults(lr=5e-5, schedule="linear", epochs=3, micro_batch=8, length=2048)
AXOLOTL = Defaults(
    lr=None,
    schedule="cosine",
    epochs=1,
    micro_batch=1,
    warmup_ratio=0.03,
    most_warmup_steps=100,
    precision="bf16",
    length=512,
)
