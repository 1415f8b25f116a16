"""Penalties on weights under ZeRO 0-3 against a loss that has them written out."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ft.engine.base import EngineOptions
from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
from dist_ft.engine.ds_config import DeepSpeedOptions
from dist_ft.engine.reference import ReferenceEngine
from dist_ft.optim.param_groups import LearningRates, ParamGroup, build_param_groups
from dist_ft.optim.penalties import PenaltyRules
from tests.helpers.phases import ALL, clone, largest_difference, run
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny import TASKS, TinyModel, global_batch, layer_groups, learning_rates

STEPS = 20
HEADS = ("head.a", "head.b")
SCHEDULE = {0: ("block.3", *HEADS), 6: ALL, 12: ("block.1", "embeddings", "head.a"), 16: ALL}
RULES = PenaltyRules(l1=2e-2, l2=3e-2, l2_sp=0.2, l2_sp_new=5e-2, new=frozenset({"block.2"}))
OPTIONS = EngineOptions(max_grad_norm=0.0)


def _groups(rules: PenaltyRules) -> list[ParamGroup]:
    model = TinyModel()
    return build_param_groups(
        layer_groups(model),
        dimensions={n: p.dim() for n, p in model.named_parameters()},
        rates=LearningRates(lr=1e-2, head_lr=2e-2, layer_decay=0.9),
        weight_decay=0.1,
        penalties=rules,
    )


def _written_out(schedule: Any) -> dict[str, Tensor]:
    """Train with penalties in the loss, by autograd and torch's own AdamW, one per group."""
    model = TinyModel()
    start = clone(dict(model.named_parameters()))
    groups = _groups(RULES)
    values = dict(model.named_parameters())
    optimizers = {
        g.name: torch.optim.AdamW([values[n] for n in g.parameters], weight_decay=g.weight_decay)
        for g in groups
    }
    trains: Any = ALL
    for step in range(STEPS):
        trains = schedule.get(step, trains)
        task = TASKS[step % len(TASKS)]
        rates = learning_rates(groups, step)
        batches = global_batch(step, micro_batches=4)
        terms = sum(len(b.targets["y"]) for b in batches)
        losses = [model(task, b.inputs, b.targets)[0] for b in batches]
        loss = torch.stack(losses).sum() / terms
        active = [g for g in groups if g.layer_group in trains and task in g.tasks]
        for name, value in ((n, values[n]) for g in active for n in g.parameters):
            new = name.startswith(("heads.", "blocks.2."))
            if not new:
                loss = loss + 0.2 / 2 * (value - start[name]).square().sum()
            if value.dim() > 1:
                loss = loss + 2e-2 * value.abs().sum()
                loss = loss + (3e-2 + 5e-2 * new) / 2 * value.square().sum()
        model.zero_grad(set_to_none=True)
        loss.backward()
        for group in active:
            optimizers[group.name].param_groups[0]["lr"] = rates[group.layer_group]
            optimizers[group.name].step()
    return clone(values)


def _deepspeed(rules: PenaltyRules, *, stage: int, **kwargs: Any) -> DeepSpeedEngine:
    return DeepSpeedEngine(
        TinyModel(),
        param_groups=_groups(rules),
        options=OPTIONS,
        deepspeed_options=DeepSpeedOptions(
            zero_stage=stage,
            micro_batch_size=4,
            gradient_accumulation_steps=2,
            offload_optimizer=kwargs.pop("offload", False),
        ),
        **kwargs,
    )


def _share() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


# Every stage, both ways to change phase, masters on the host.
CASES = ((0, "rebuild", False), (1, "rebuild", False), (2, "in_place", True), (3, "rebuild", False))


def _check_share(anchor_bytes: int, stage: int) -> None:
    own = ("heads", "blocks.2")
    pulled = sum(p.numel() for n, p in TinyModel().named_parameters() if not n.startswith(own))
    share = pulled * 4 / (dist.get_world_size() if stage else 1)
    padding = 4 * 4 * 2 * len(ALL)  # a few elements per parameter group
    assert share <= anchor_bytes <= share + padding, stage


def _follows(expected: dict[str, Tensor]) -> None:
    for stage, switch, offload in CASES:
        engine: Any = _deepspeed(RULES, stage=stage, switch=switch, offload=offload)
        run(engine, SCHEDULE, steps=range(STEPS), micro_batches=4, share=_share())
        _check_share(engine.set_trainable(ALL).anchor_bytes, stage)
        weights = engine.full_weights()
        if dist.get_rank() == 0:
            assert largest_difference(weights, expected) <= 1e-5, (stage, switch)


def test_penalties_equal_a_loss_that_has_them() -> None:
    expected = _written_out(SCHEDULE)
    reference = ReferenceEngine(TinyModel(), param_groups=_groups(RULES), options=OPTIONS)
    run(reference, SCHEDULE, steps=range(STEPS), micro_batches=4)
    assert largest_difference(reference.full_weights(), expected) <= 1e-5
    plain = ReferenceEngine(TinyModel(), param_groups=_groups(PenaltyRules()), options=OPTIONS)
    run(plain, SCHEDULE, steps=range(STEPS), micro_batches=4)
    assert largest_difference(plain.full_weights(), expected) > 1e-2
    run_distributed(_follows, expected)
