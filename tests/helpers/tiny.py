"""A tiny two-task model and data whose every number is a function of a seed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dist_ft.model.layer_groups import LayerGroup
from dist_ft.optim.param_groups import LearningRates, ParamGroup, build_param_groups

BLOCKS = 4
WIDTH = 12
TASKS = ("a", "b")


class Block(nn.Module):
    """A residual feed-forward block with dropout and normalisation, like a transformer's."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(
            hidden + self.dropout(self.outer(torch.nn.functional.gelu(self.inner(hidden))))
        )


class TinyModel(nn.Module):
    """Embeddings, blocks and one head per task; returns the summed squared error."""

    def __init__(self, *, width: int = WIDTH, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embeddings = nn.Embedding(31, width)
            self.blocks = nn.ModuleList([Block(width, dropout) for _ in range(BLOCKS)])
            self.heads = nn.ModuleDict({t: nn.Linear(width, 3) for t in TASKS})

    def forward(
        self, task: str, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]
    ) -> tuple[Tensor, Any]:
        hidden = self.embeddings(inputs["input_ids"]).mean(1)
        for block in self.blocks:
            hidden = block(hidden)
        out = self.heads[task](hidden)
        loss = ((out - targets["y"]).to(torch.promote_types(out.dtype, torch.float32)) ** 2).sum()
        return loss, (None if self.training else out)


def layer_groups(model: nn.Module) -> list[LayerGroup]:
    """Return embeddings, the blocks and the heads, bottom to top."""
    names = [n for n, _ in model.named_parameters()]

    def group(name: str, kind: Any, prefix: str, tasks: tuple[str, ...]) -> LayerGroup:
        own = tuple(n for n in names if n.startswith(prefix))
        return LayerGroup(name=name, kind=kind, parameters=own, tasks=frozenset(tasks))

    return [
        group("embeddings", "embeddings", "embeddings.", TASKS),
        *(group(f"block.{i}", "block", f"blocks.{i}.", TASKS) for i in range(BLOCKS)),
        *(group(f"head.{t}", "head", f"heads.{t}.", (t,)) for t in TASKS),
    ]


def param_groups(
    model: nn.Module, *, lr: float = 1e-2, weight_decay: float = 0.1
) -> list[ParamGroup]:
    """Return the model's optimizer groups with layer-wise decay of the learning rate."""
    return build_param_groups(
        layer_groups(model),
        dimensions={n: p.dim() for n, p in model.named_parameters()},
        rates=LearningRates(lr=lr, head_lr=2 * lr, layer_decay=0.9),
        weight_decay=weight_decay,
    )


@dataclass
class TinyBatch:
    """A micro-batch as the engine wants it."""

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    index: int
    loss_weight: float = 1.0
    rows: npt.NDArray[np.int64] = field(default_factory=lambda: np.arange(0))
    distinct: bool = True
    variants: None = None


def global_batch(step: int, *, micro_batches: int, rows: int = 4) -> list[TinyBatch]:
    """Return the micro-batches of a step, the same whoever asks."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [
        TinyBatch(
            {"input_ids": torch.randint(31, (rows, 5), generator=generator)},
            {"y": torch.randn(rows, 3, generator=generator)},
            index,
        )
        for index in range(micro_batches)
    ]


def learning_rates(groups: list[ParamGroup], step: int) -> dict[str, float]:
    """Return a learning rate for each layer group that changes with the step."""
    return {g.layer_group: g.lr / (1 + 0.05 * step) for g in groups}
