"""Looks into a finished run: what moved, how sure it is, what it confuses, forgets and looks at."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_ft.config import Recipe
from dist_ft.data.loader import MicroBatch, eval_batches
from dist_ft.engine.base import on_device
from dist_ft.engine.loss_module import LossModule
from dist_ft.freezing.similarity import linear_cka
from dist_ft.model.trunk import group_modules
from dist_ft.tasks.base import Choice
from dist_ft.tasks.calibration import confusion_matrix, reliability
from dist_ft.train.attributions import attribute_tokens
from dist_ft.train.checkpoint import CheckpointReader
from dist_ft.train.evaluate import EvalData
from dist_ft.train.forgetting import count_forgetting
from dist_ft.train.parts import Parts, eval_data
from dist_ft.train.recorder import surviving_events
from dist_ft.train.robustness import measure_robustness
from dist_ft.train.run_folder import RunFolder
from dist_ft.train.weights import load_weights

FILE = "analysis.json"
HARDEST = 10
CKA_ROWS = 32

Forward = Callable[[str, MicroBatch], tuple[Tensor, Any]]


@dataclass
class _Seen:
    """What one pass over a task's rows showed."""

    confidence: list[Tensor] = field(default_factory=list)
    correct: list[Tensor] = field(default_factory=list)
    predictions: list[int] = field(default_factory=list)
    references: list[int] = field(default_factory=list)
    losses: list[tuple[float, int]] = field(default_factory=list)
    classes: int = 0

    def add(self, choices: list[Choice], batch: MicroBatch) -> None:
        """Add the choices of a micro-batch."""
        for choice in choices:
            probabilities = choice.logits.float().softmax(-1)
            best, prediction = probabilities.max(-1)
            self.confidence.append(best.cpu())
            self.correct.append((prediction == choice.labels).float().cpu())
            if len(choices) == 1 and len(choice.labels) == len(batch.rows):
                right = probabilities.gather(1, choice.labels[:, None])[:, 0]
                losses = (-right.clamp_min(1e-30).log()).tolist()
                self.losses += zip(losses, batch.rows.tolist(), strict=True)
                self.predictions += prediction.tolist()
                self.references += choice.labels.tolist()
                self.classes = choice.logits.shape[-1]


def analyse(recipe: Recipe, parts: Parts, reader: CheckpointReader, *, folder: Path) -> Path:
    """Write ``analysis.json`` into a run's folder and return its path.

    Args:
        recipe: The run's.
        parts: Its parts with the weights from before the run; they get those of the checkpoint.
        reader: The checkpoint.
        folder: The run's folder.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = LossModule(parts.model, {t.task.name: t.task.loss for t in parts.tasks})
    module = module.eval().to(device)

    @torch.no_grad()
    def forward(task: str, batch: MicroBatch) -> tuple[Tensor, Any]:
        return module(task, on_device(batch.inputs, device), on_device(batch.targets, device))

    data = eval_data(recipe, parts, split="validation")
    before = {n: p.detach().float().cpu().clone() for n, p in parts.model.named_parameters()}
    blocks_before = _block_outputs(parts, data[0], forward)
    load_weights(parts.model, reader)
    module.to(device)
    blocks_after = _block_outputs(parts, data[0], forward)
    body = {
        "step": reader.trainer["progress"]["step"],
        "split": "validation",
        "groups": _groups(parts, before, blocks_before, blocks_after),
        "tasks": {one.task.name: _task(parts, one, forward) for one in data},
    }
    log = surviving_events(RunFolder(folder).metrics)
    configs = {config.name: config for config in recipe.tasks}
    for prepared in parts.tasks:
        of_task = next((one for one in data if one.task.name == prepared.task.name), None)
        if of_task is None:
            continue
        found = body["tasks"][prepared.task.name]
        found["forgotten"] = _forgotten(parts, of_task, log)
        found["robustness"] = measure_robustness(
            configs[prepared.task.name],
            prepared=prepared,
            data=of_task,
            tokenizer=parts.tokenizer,
            forward=forward,
        )
    path = folder / FILE
    path.write_text(json.dumps(body, indent=1))
    return path


def _groups(
    parts: Parts,
    before: dict[str, Tensor],
    blocks_before: dict[str, Tensor],
    blocks_after: dict[str, Tensor],
) -> list[dict[str, Any]]:
    now = dict(parts.model.named_parameters())
    rows: list[dict[str, Any]] = []
    for group in parts.groups:
        moved = sum(
            float((now[n].detach().float().cpu() - before[n]).square().sum())
            for n in group.parameters
        )
        size = sum(float(before[n].square().sum()) for n in group.parameters)
        row: dict[str, Any] = {"group": group.name, "drift": (moved / max(size, 1e-30)) ** 0.5}
        if group.name in blocks_after:
            row["cka"] = linear_cka(blocks_before[group.name], blocks_after[group.name])
        rows.append(row)
    return rows


def _block_outputs(parts: Parts, data: EvalData, forward: Forward) -> dict[str, Tensor]:
    """Return each block's output on some rows, its mean over positions, [rows, features]."""
    batch = next(_batches(data, size=min(CKA_ROWS, len(data.dataset))))
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            hidden = output[0] if isinstance(output, (tuple, list)) else output
            assert isinstance(hidden, Tensor)
            found[name] = hidden.detach().float().mean(dim=1).cpu()

        return hook

    handles = [
        group_modules(parts.model, g.parameters)[0].register_forward_hook(keep(g.name))
        for g in parts.groups
        if g.kind == "block"
    ]
    try:
        forward(data.task.name, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _batches(data: EvalData, *, size: int) -> Any:
    return eval_batches(data.dataset, spec=data.spec, micro_batch_size=size, rank=0, world_size=1)


def _task(parts: Parts, data: EvalData, forward: Forward) -> dict[str, Any]:
    """Return what is known of a task's predictions; parts that make no sense for it are absent."""
    seen = _Seen()
    for batch in _batches(data, size=data.micro_batch_size):
        loss, outputs = forward(data.task.name, batch)
        if batch.loss_weight > 0:
            targets = on_device(batch.targets, loss.device)
            seen.add(data.task.choices(outputs, targets), batch)
    body: dict[str, Any] = {}
    if seen.confidence:
        confidence = torch.cat(seen.confidence).double().numpy()
        body["calibration"] = reliability(confidence, torch.cat(seen.correct).double().numpy())
    if not seen.losses:
        return body
    names = _names(data, classes=seen.classes)
    body["labels"] = names
    body["confusion"] = confusion_matrix(
        np.array(seen.predictions), np.array(seen.references), classes=seen.classes
    )
    hardest = sorted(
        zip(seen.losses, seen.predictions, seen.references, strict=True), reverse=True
    )[:HARDEST]
    body["hardest"] = [
        {
            "row": row,
            "loss": loss,
            "label": names[label],
            "prediction": names[prediction],
            "text": _text(parts, data, row),
        }
        for (loss, row), prediction, label in hardest
    ]
    body["attributions"] = attribute_tokens(parts, data, row=hardest[0][0][1])
    return body


def _forgotten(parts: Parts, data: EvalData, log: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the rows that were right and then wrong again most often; empty if none can be."""
    found = count_forgetting(log, task=data.task.name, rows=len(data.dataset))
    if found is None:
        return {}
    most = [
        {"row": row, "forgotten": events, "text": _text(parts, data, row)}
        for row, events in found.most(HARDEST)
    ]
    return {**found.summary(), "rows": most}


def _names(data: EvalData, *, classes: int) -> list[str]:
    labels = getattr(data.task, "labels", None) or [str(i) for i in range(classes)]
    return [str(label) for label in labels]


def _text(parts: Parts, data: EvalData, row: int) -> str | None:
    if not hasattr(parts.tokenizer, "decode"):
        return None
    ids = data.dataset.take(np.array([row]), columns={"input_ids"})["input_ids"][0]
    return parts.tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True)
