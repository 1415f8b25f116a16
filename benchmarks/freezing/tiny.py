"""A tiny transformer with its data and schedules, and the plain-torch answer to them.

Everything is a function of fixed seeds: each system starts from the same weights and sees the same
rows in the same order, so whatever differs afterwards is the system's doing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from benchmarks.freezing.outcome import Weights, copy_of

BLOCKS = 4
TASKS = ("a", "b")
WORLD_SIZE = 2
LR, WEIGHT_DECAY = 1e-2, 0.1
_WIDTH, _HEADS, _VOCABULARY, _LENGTH, _CLASSES = 16, 2, 50, 8, 5
ROWS_PER_RANK, STEPS_PER_EPOCH = 4, 6
_ROWS = ROWS_PER_RANK * WORLD_SIZE * STEPS_PER_EPOCH


class Block(nn.Module):
    """A transformer layer as in BERT: attention and feed-forward, each with its normalisation."""

    def __init__(self) -> None:
        super().__init__()
        # A key bias cannot change the softmax: its gradient is rounding noise, and Adam would
        # blow that up to full steps that differ on every system.
        self.query_key_value = nn.Linear(_WIDTH, 3 * _WIDTH, bias=False)
        self.project = nn.Linear(_WIDTH, _WIDTH)
        self.attention_norm = nn.LayerNorm(_WIDTH)
        self.inner = nn.Linear(_WIDTH, 2 * _WIDTH)
        self.outer = nn.Linear(2 * _WIDTH, _WIDTH)
        self.norm = nn.LayerNorm(_WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return hidden states of the same shape (rows x length x width)."""
        rows, length, width = hidden.shape
        heads = self.query_key_value(hidden).view(rows, length, 3, _HEADS, width // _HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value)
        attended = attended.transpose(1, 2).reshape(rows, length, width)
        hidden = self.attention_norm(hidden + self.project(attended))
        return self.norm(hidden + self.outer(gelu(self.inner(hidden))))


class TinyTransformer(nn.Module):
    """Embeddings, four blocks and one classification head per task."""

    def __init__(self, *, tasks: Sequence[str] = TASKS) -> None:
        """Initialise from a fixed seed; the backbone does not depend on the tasks."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embeddings = nn.Embedding(_VOCABULARY, _WIDTH)
            self.blocks = nn.ModuleList([Block() for _ in range(BLOCKS)])
            heads = {task: nn.Linear(_WIDTH, _CLASSES) for task in TASKS}
            self.heads = nn.ModuleDict({task: heads[task] for task in tasks})

    def forward(
        self, task: str, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]
    ) -> tuple[Tensor, Any]:
        """Return the cross-entropy summed over the rows (fp32 scalar) and the logits."""
        hidden = self.embeddings(inputs["input_ids"])
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.heads[task](hidden.mean(1)).float()
        return cross_entropy(logits, targets["labels"], reduction="sum"), logits


def group_of(parameter: str) -> str:
    """Return the layer group of a parameter: ``embeddings``, ``block.I`` or ``head.TASK``."""
    first, second, *_ = parameter.split(".")
    return {"blocks": f"block.{second}", "heads": f"head.{second}"}.get(first, first)


def groups(tasks: Sequence[str]) -> tuple[str, ...]:
    """Return all layer groups, bottom to top."""
    blocks = (f"block.{i}" for i in range(BLOCKS))
    return ("embeddings", *blocks, *(f"head.{task}" for task in tasks))


def set_trainable(model: nn.Module, trainable: Sequence[str]) -> None:
    """Toggle `requires_grad`, as the systems do that have nothing better."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(group_of(name.removeprefix("module.")) in trainable)


@dataclass(frozen=True)
class Span:
    """Consecutive optimizer steps in which the same layer groups train.

    Attributes:
        steps: How many.
        trainable: Layer groups that train.
        tasks: Step i of the span runs task i modulo their number.
    """

    steps: int
    trainable: tuple[str, ...]
    tasks: tuple[str, ...] = ("a",)

    @property
    def idle(self) -> frozenset[str]:
        """Layer groups that must not move: frozen ones, and heads of tasks that do not run."""
        heads = {f"head.{task}" for task in self.tasks}
        moving = {g for g in self.trainable if not g.startswith("head.") or g in heads}
        return frozenset(groups(TASKS)) - moving


Schedule = tuple[Span, ...]

_TOP, _MIDDLE, _ALL = (
    ("block.3", "head.a"),
    ("block.2", "block.3", "head.a"),
    groups(("a",)),
)
# One epoch a phase: Lightning's callbacks change between epochs.
THAW: Schedule = tuple(Span(STEPS_PER_EPOCH, trainable) for trainable in (_TOP, _MIDDLE, _ALL))
THAW_AND_FREEZE: Schedule = (*THAW, Span(STEPS_PER_EPOCH, _TOP), Span(STEPS_PER_EPOCH, _ALL))
HEADS: Schedule = (
    Span(6, groups(TASKS), tasks=("a", "b")),
    Span(20, groups(TASKS), tasks=("b",)),
)
BLOCK_PERIOD, BLOCK_PERIODS = 4, 6


def block_schedule(draws: Sequence[int]) -> Schedule:
    """Return a schedule that trains one drawn block at a time, besides embeddings and head."""
    return tuple(Span(BLOCK_PERIOD, ("embeddings", f"block.{i}", "head.a")) for i in draws)


def data() -> tuple[Tensor, Tensor]:
    """Return the rows of an epoch: input_ids (rows x length, int64) and labels (rows, int64)."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(_VOCABULARY, (_ROWS, _LENGTH), generator=generator)
    return inputs, torch.randint(_CLASSES, (_ROWS,), generator=generator)


def rank_batch(step: int, *, rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a rank's rows of a step: every second one, as torch's DistributedSampler deals."""
    inputs, labels = data()
    begin = step % STEPS_PER_EPOCH * ROWS_PER_RANK * WORLD_SIZE
    own = slice(begin + rank, begin + ROWS_PER_RANK * WORLD_SIZE, WORLD_SIZE)
    return {"input_ids": inputs[own]}, {"labels": labels[own]}


def adamw(parameters: Iterable[Any]) -> torch.optim.AdamW:
    """Return the optimizer of the reference and of every peer, over parameters or groups of them.

    Fused, as dist_ft's is: the plain one rounds otherwise, by 1e-5 on some CPUs, in which a
    difference in what is computed would hide.
    """
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)


def reference(schedule: Schedule, *, tasks: Sequence[str]) -> list[Weights]:
    """Train with plain torch in one process, without dist_ft; return the weights of each phase.

    Frozen parameters have no gradient, so torch's AdamW leaves them and their moments alone.
    """
    model = TinyTransformer(tasks=tasks)
    optimizer = adamw(model.parameters())
    snapshots = [copy_of(dict(model.named_parameters()))]
    first = 0
    for span in schedule:
        set_trainable(model, span.trainable)
        for step in range(first, first + span.steps):
            task = span.tasks[(step - first) % len(span.tasks)]
            for rank in range(WORLD_SIZE):
                loss, _ = model(task, *rank_batch(step, rank=rank))
                (loss / (ROWS_PER_RANK * WORLD_SIZE)).backward()
            optimizer.step()
            optimizer.zero_grad()
        first += span.steps
        snapshots.append(copy_of(dict(model.named_parameters())))
    return snapshots
