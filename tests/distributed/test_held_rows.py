"""Rows of the embeddings that are frozen while the others train, under ZeRO 0-3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.func import functional_call

from dist_ft.engine.base import EngineOptions
from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
from dist_ft.engine.ds_config import DeepSpeedOptions
from dist_ft.engine.reference import ReferenceEngine
from dist_ft.optim.param_groups import LearningRates, build_param_groups, hold_rows
from dist_ft.recipe import load_recipe
from dist_ft.train.held_rows import with_frozen_rows
from dist_ft.train.parts import make_parts
from tests.helpers.phases import ALL, largest_difference, run
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny import TASKS, TinyModel, global_batch, learning_rates, param_groups
from tests.helpers.tiny_run import write_recipe

NAME = "embeddings.weight"
# Cut by the border between two ranks' partitions, and at the end.
HELD = ((3, 19), (28, 31))
# The embeddings leave and come back: their hooks and state are made anew.
SCHEDULE = {0: ALL, 6: ALL[2:], 10: ALL}
STEPS = 14
CLIP = 0.5


def _is_held() -> Tensor:
    rows = torch.zeros(31, dtype=torch.bool)
    for first, end in HELD:
        rows[first:end] = True
    return rows


def _engine(stage: int, **kwargs: Any) -> DeepSpeedEngine:
    model = TinyModel()
    return DeepSpeedEngine(
        model,
        param_groups=hold_rows(param_groups(model), NAME, rows=HELD),
        options=EngineOptions(max_grad_norm=CLIP, precision=kwargs.pop("precision", "fp32")),
        deepspeed_options=DeepSpeedOptions(stage, 4, 1),
        **kwargs,
    )


def _check(stage: int, expected: Any) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for precision, switch in (("fp32", "rebuild"), ("fp32", "in_place"), ("bf16", "rebuild")):
        engine = _engine(stage, precision=precision, switch=switch)
        run(engine, SCHEDULE, steps=range(STEPS), micro_batches=2, share=(rank, world))
        weights = engine.full_weights()
        if rank:
            continue
        start = TinyModel().get_parameter(NAME).detach().to(weights[NAME].dtype)
        moved = (weights[NAME] != start).any(1)
        assert torch.equal(moved, ~_is_held()), (precision, switch)
        if precision == "fp32":
            assert largest_difference(weights, expected) <= 1e-5, switch


def _reference() -> dict[str, Tensor]:
    model = TinyModel()
    engine = ReferenceEngine(
        model,
        param_groups=hold_rows(param_groups(model), NAME, rows=HELD),
        options=EngineOptions(max_grad_norm=CLIP),
    )
    run(engine, SCHEDULE, steps=range(STEPS), micro_batches=2)
    return engine.full_weights()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_held_rows_stay_and_the_others_follow_the_reference(stage: int) -> None:
    run_distributed(_check, stage, _reference())


def test_the_reference_trains_as_if_held_rows_were_no_parameter() -> None:
    """Plain torch whose parameter is only the other rows: norm, moments and decay without them."""
    model = TinyModel()
    start = model.get_parameter(NAME).detach().clone()
    own = torch.nn.Parameter(start[~_is_held()].clone())
    groups = param_groups(model)
    parameters = {n: p for n, p in model.named_parameters() if n != NAME} | {NAME: own}
    optimizers = {
        g.name: torch.optim.AdamW(
            [parameters[n] for n in g.parameters], weight_decay=g.weight_decay, fused=True
        )
        for g in groups
    }
    for step in range(STEPS):
        trainable = SCHEDULE[max(s for s in SCHEDULE if s <= step)]
        task, batches = TASKS[step % 2], global_batch(step, micro_batches=2)
        active = [g for g in groups if g.layer_group in trainable and task in g.tasks]
        names = [n for g in active for n in g.parameters]
        table = start.clone()
        table[~_is_held()] = own
        given = {**parameters, NAME: table}
        count = sum(len(b.targets["y"]) for b in batches)
        losses = [functional_call(model, given, (task, b.inputs, b.targets))[0] for b in batches]
        loss = torch.stack(losses).sum() / count
        used = [parameters[n] for n in names]
        for parameter, gradient in zip(used, torch.autograd.grad(loss, used), strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(used, CLIP)
        rates = learning_rates(groups, step)
        for group in active:
            optimizers[group.name].param_groups[0]["lr"] = rates[group.layer_group]
            optimizers[group.name].step()
    expected = {n: p.detach() for n, p in parameters.items() if n != NAME}
    weights = _reference()
    assert torch.equal(weights[NAME][_is_held()], start[_is_held()])
    assert float((weights[NAME][~_is_held()] - own.detach()).abs().max()) <= 1e-6
    assert largest_difference({n: weights[n] for n in expected}, expected) <= 1e-6


def _run(folder: Path, rows: Any) -> Any:
    """Return a recipe's parts and its parameter groups with rows held."""
    text = write_recipe(folder, freezing={"frozen_embedding_rows": rows})
    recipe = load_recipe(text)
    parts = make_parts(recipe, lambda _: None)
    dimensions = {n: p.dim() for n, p in parts.model.named_parameters()}
    groups = build_param_groups(
        parts.groups, dimensions=dimensions, rates=LearningRates(1e-3), weight_decay=0.1
    )
    return with_frozen_rows(groups, recipe, model=parts.model)


def test_a_recipe_holds_rows_of_the_word_embeddings(tmp_path: Path) -> None:
    groups = _run(tmp_path, [[0, 5], [7, 9]])
    held = {name: rows for g in groups for name, rows in g.held_rows.items()}
    (name,) = held
    assert name.endswith("word_embeddings.weight")
    assert held[name] == ((0, 5), (7, 9))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[5, 5]], r"frozen_embedding_rows: ranges of rows .* got \[5, 5\]"),
        ([[0, 10_000]], r"frozen_embedding_rows: ranges of rows .* within 0 to"),
    ],
)
def test_rows_that_are_not_there_are_refused(tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _run(tmp_path, rows)
