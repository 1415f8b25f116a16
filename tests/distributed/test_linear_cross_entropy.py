"""The loss that a head computes equals that of its logits, in every ZeRO stage, tied or not."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ft.engine.base import EngineOptions
from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
from dist_ft.engine.ds_config import DeepSpeedOptions
from dist_ft.engine.loss_module import FusedLoss, InTraining, LossModule
from dist_ft.engine.objective import Objective
from dist_ft.engine.reference import ReferenceEngine
from dist_ft.model.backbone import HeadSpec, build_model
from dist_ft.model.layer_groups import find_layer_groups
from dist_ft.model.scoring_head import ScoringHead
from dist_ft.optim.param_groups import LearningRates, build_param_groups
from dist_ft.tasks.generation import Generation
from dist_ft.tasks.output_regularization import OutputRegularizer
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny import TinyBatch
from tests.helpers.tiny_models import tiny_config

SMOOTHING = 0.1
OPTIONS = EngineOptions(seed=3, eps=1e-5, max_grad_norm=1.0)


def _module(name: str, style: Literal["causal", "seq2seq"], *, fused: bool, tied: bool) -> Any:
    config: Any = tiny_config(name)
    config.tie_word_embeddings = tied
    task = Generation(name="a", style=style)
    heads = [HeadSpec("a", task.auto_class, {})]
    model = build_model(config, heads=heads, dtype=torch.float32, seed=0)
    groups = find_layer_groups(model)
    head = ScoringHead.find(model, "a")
    assert (head.head.weight is model.get_parameter(groups[0].parameters[0])) == tied
    extra = InTraining(
        {"a": Objective(OutputRegularizer(task.loss, task.choices, label_smoothing=SMOOTHING))},
        fused={"a": FusedLoss(head, task.logit_labels, SMOOTHING)} if fused else {},
    )
    if name == "bart":  # zeros as it comes, Marian's are not
        model.heads["a"].get_buffer("final_logits_bias").copy_(torch.linspace(-1, 1, 64))
    module = LossModule(model, {"a": task.loss}, in_training=extra)
    param_groups = build_param_groups(
        groups,
        dimensions={n: p.dim() for n, p in model.named_parameters()},
        rates=LearningRates(1e-3),
        weight_decay=0.0,
    )
    return module, param_groups


def _batch(style: str, step: int, index: int) -> TinyBatch:
    draw = torch.Generator().manual_seed(100 * step + index)
    ids = torch.randint(3, 60, (3, 9), generator=draw)
    labels = ids.clone()
    labels[:, : 2 + index] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if style == "seq2seq":
        inputs["labels"] = labels
    return TinyBatch(inputs, {"labels": labels}, index)


def _train(
    name: str, style: Literal["causal", "seq2seq"], stage: int | None, *, fused: bool, tied: bool
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights after four steps, halfway with the embeddings frozen."""
    module, groups = _module(name, style, fused=fused, tied=tied)
    if stage is None:
        engine: Any = ReferenceEngine(module, param_groups=groups, options=OPTIONS)
        rank, world = 0, 1
    else:
        sizes = DeepSpeedOptions(
            zero_stage=stage, micro_batch_size=3, gradient_accumulation_steps=1
        )
        engine = DeepSpeedEngine(
            module, param_groups=groups, options=OPTIONS, deepspeed_options=sizes
        )
        rank, world = dist.get_rank(), dist.get_world_size()
    names = [g.layer_group for g in groups]
    losses: list[float] = []
    for step in range(4):
        if step in (0, 2):
            engine.set_trainable(n for n in names if step < 2 or n != "embeddings")
        batches = [_batch(style, step, index) for index in range(2)]
        count = sum(int((b.targets["labels"][:, style == "causal" :] >= 0).sum()) for b in batches)
        result = engine.train_step(
            step,
            task="a",
            micro_batches=batches[rank::world],
            global_count=count,
            learning_rates=dict.fromkeys(names, 1e-3),
        )
        loss = result.loss.detach().clone()
        if stage is not None:
            dist.all_reduce(loss)
        losses.append(float(loss))
    weights = engine.full_weights()
    engine.close()
    return losses, weights


def _compare() -> None:
    cases: list[tuple[str, Literal["causal", "seq2seq"], bool, tuple[int, ...]]] = [
        ("gpt2", "causal", True, (0, 1, 2, 3)),
        ("llama", "causal", False, (2, 3)),
        ("bart", "seq2seq", True, (1, 3)),
    ]
    for name, style, tied, stages in cases:
        plain, expected = _train(name, style, None, fused=False, tied=tied)
        for stage in stages:
            losses, weights = _train(name, style, stage, fused=True, tied=tied)
            for one, other in zip(losses, plain, strict=True):
                assert abs(one - other) <= 1e-5 * other, (name, stage, losses, plain)
            for key, value in weights.items():
                difference = float((value - expected[key]).abs().max())
                # Four steps of 1e-3: what Adam divides by 1e-5 and less is rounding.
                assert difference <= 1e-5, (name, stage, key, difference)


def test_a_fused_loss_trains_like_the_logits_it_never_makes() -> None:
    run_distributed(_compare)
