"""What a run is made of before it has an engine: data, model, layer groups, schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from dist_ft.config import ModelConfig, Recipe
from dist_ft.data.loader import MicroBatch
from dist_ft.data.sampling import Mixture
from dist_ft.freezing.policies import FreezePolicy
from dist_ft.freezing.schedule import LayerOrder
from dist_ft.model.backbone import HeadSpec, ModelSource, MultiTaskModel, load_model, load_tokenizer
from dist_ft.model.layer_groups import LayerGroup, find_layer_groups
from dist_ft.train.data import PreparedTask, prepare_tasks
from dist_ft.train.evaluate import EvalData
from dist_ft.train.extensions import NO_EXTENSIONS, Extensions
from dist_ft.train.loading import Lengths, plan_steps
from dist_ft.train.policy import check_every_task_trains, make_policy


@dataclass(frozen=True)
class Parts:
    """What a run is made of before an engine exists."""

    tokenizer: PreTrainedTokenizerBase
    tasks: list[PreparedTask]
    model: MultiTaskModel
    groups: list[LayerGroup]
    policy: FreezePolicy
    total_steps: int
    lengths: Lengths
    mixture: Mixture


def make_parts(
    recipe: Recipe, say: Callable[[str], None], *, extensions: Extensions = NO_EXTENSIONS
) -> Parts:
    """Return data, model, layer groups and schedule; needs no process group."""
    source = model_source(recipe.model)
    tokenizer = load_tokenizer(source)
    tasks = prepare_tasks(recipe, tokenizer=tokenizer, say=say, extensions=extensions)
    heads = [HeadSpec(t.task.name, t.task.auto_class, t.task.config_updates()) for t in tasks]
    model, _ = load_model(source, heads=heads, dtype=torch.float32, seed=recipe.seed)
    groups = find_layer_groups(model, overrides=recipe.freezing.layer_groups or None)
    steps = plan_steps(recipe, tasks)
    order = LayerOrder.of([(g.name, g.kind) for g in groups])
    if extensions.policy is not None:
        policy = extensions.policy(order, steps.total_steps)
    else:
        policy = make_policy(
            recipe.freezing,
            order=order,
            to_steps=steps.lengths.steps,
            total_steps=steps.total_steps,
            seed=recipe.seed,
        )
    check_every_task_trains(
        policy,
        tasks=[t.task.name for t in tasks],
        reach={g.name: g.tasks for g in groups},
    )
    return Parts(
        tokenizer, tasks, model, groups, policy, steps.total_steps, steps.lengths, steps.mixture
    )


def model_source(config: ModelConfig) -> ModelSource:
    """Return where the model comes from."""
    return ModelSource(
        path=config.path,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
        attention=_attention(config.attention),
        pad_token=config.pad_token,
    )


def _attention(choice: str) -> str | None:
    if choice != "auto":
        return choice
    # On a CPU torch's fused attention measured slower than plain matrix products: 2.4 s against
    # 1.5 s of CPU time for MiniLM, bf16, 16 x 256 tokens, forward and backward.
    return None if torch.cuda.is_available() else "eager"


def eval_data(recipe: Recipe, parts: Parts, *, split: str) -> list[EvalData]:
    """Return what is scored on `split`; tasks without it are left out."""
    size = recipe.evaluation.micro_batch_size or 2 * recipe.train.micro_batch_size
    return [
        EvalData(
            task=t.task,
            split=split,
            dataset=t.datasets[split],
            spec=t.task.collate_spec(parts.tokenizer, evaluation=True),
            micro_batch_size=size,
            generate=_generator(parts, t, recipe) if t.task.generates else None,
        )
        for t in parts.tasks
        if split in t.datasets
    ]


def _generator(
    parts: Parts, prepared: PreparedTask, recipe: Recipe
) -> Callable[[MicroBatch], list[str]]:
    synced = recipe.engine.type == "deepspeed" and recipe.engine.zero_stage == 3

    def generate(batch: MicroBatch) -> list[str]:
        device = next(parts.model.parameters()).device
        inputs = {name: value.to(device) for name, value in batch.inputs.items()}
        return prepared.task.generate(
            parts.model,
            batch=replace(batch, inputs=inputs),
            tokenizer=parts.tokenizer,
            synced=synced,
        )

    return generate
