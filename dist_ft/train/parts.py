"""What a run is made of before it has an engine: data, model, layer groups, schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from dist_ft.config import ModelConfig, Recipe
from dist_ft.data.loader import MicroBatch
from dist_ft.data.sampling import Mixture
from dist_ft.data.shards import ShardedDataset
from dist_ft.freezing.policies import FreezePolicy
from dist_ft.freezing.schedule import LayerOrder
from dist_ft.model.backbone import HeadSpec, ModelSource, MultiTaskModel, load_model, load_tokenizer
from dist_ft.model.layer_groups import LayerGroup, find_layer_groups
from dist_ft.model.lora import LoraSettings, add_lora, fix_base
from dist_ft.model.processors import load_processor
from dist_ft.tasks.base import Task
from dist_ft.tasks.output_regularization import OutputPenalty
from dist_ft.train.data import PreparedTask, prepare_tasks
from dist_ft.train.evaluate import EvalData
from dist_ft.train.extensions import NO_EXTENSIONS, Extensions
from dist_ft.train.loading import Lengths, plan_steps
from dist_ft.train.policy import check_every_task_trains, make_policy
from dist_ft.train.regularization import prepare_model
from dist_ft.train.run_folder import RunFolder
from dist_ft.train.run_shards import prepare_resumed, reopen_tasks


@dataclass(frozen=True)
class Parts:
    """What a run is made of before an engine exists."""

    tokenizer: Any
    tasks: list[PreparedTask]
    model: MultiTaskModel
    groups: list[LayerGroup]
    policy: FreezePolicy
    total_steps: int
    lengths: Lengths
    mixture: Mixture
    turns: int = 1
    regularizers: Mapping[str, OutputPenalty] = field(default_factory=dict[str, OutputPenalty])


def make_parts(
    recipe: Recipe,
    say: Callable[[str], None],
    *,
    extensions: Extensions = NO_EXTENSIONS,
    of_run: RunFolder | None = None,
    goes_on: bool = False,
) -> Parts:
    """Return data, model, layer groups and schedule; needs no process group.

    Args:
        recipe: The recipe.
        say: Prints a line.
        extensions: A program's own tasks and freezing policy.
        of_run: A run that was trained already: its own data are opened, and the source is not
            looked at.
        goes_on: Whether that run is to train further, for which the source must be what it was.

    Raises:
        ValueError: If the recipe does not fit the model or the data, or the data are not the run's.
    """
    tokenizer = load_preprocessor(recipe)
    if of_run is None:
        tasks = prepare_tasks(recipe, tokenizer=tokenizer, say=say, extensions=extensions)
    else:
        tasks = (prepare_resumed if goes_on else reopen_tasks)(
            recipe, folder=of_run, tokenizer=tokenizer, extensions=extensions, say=say
        )
    model, groups = make_model(recipe, [t.task for t in tasks], tokenizer=tokenizer)
    check_vocabulary(tasks, model=model.backbone)
    steps = plan_steps(recipe, tasks)
    order = LayerOrder.of([(g.name, g.freezing_kind) for g in groups])
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
    prepare_model(recipe, model, groups=groups, trains=policy.universe())
    return Parts(
        tokenizer, tasks, model, groups, policy, steps.total_steps, steps.lengths, steps.mixture,
        recipe.mixture.tasks_per_step, extensions.regularizers,
    )  # fmt: skip


def make_model(
    recipe: Recipe, tasks: Sequence[Task], *, tokenizer: Any
) -> tuple[MultiTaskModel, list[LayerGroup]]:
    """Return the pre-trained model with the heads of the tasks, and its layer groups."""
    heads = [HeadSpec(task.name, task.auto_class, task.config_updates()) for task in tasks]
    model = load_model(
        model_source(recipe.model),
        heads=heads,
        dtype=torch.float32,
        seed=recipe.seed,
        pad_token_id=getattr(tokenizer, "pad_token_id", None),
    )
    if recipe.model.lora is not None:
        add_lora(model, LoraSettings(**recipe.model.lora.model_dump()), seed=recipe.seed)
    groups = find_layer_groups(model, overrides=recipe.freezing.layer_groups or None)
    if recipe.model.lora is not None:
        classes = {h.name: h.auto_class for h in heads}
        groups = fix_base(groups, auto_classes=classes, fresh=model.fresh)
    return model, groups


def check_vocabulary(tasks: Sequence[PreparedTask], *, model: torch.nn.Module) -> None:
    """Check that the model has an embedding for every token of the data.

    Raises:
        ValueError: If a token id is too large, as where the tokenizer has got tokens that the
            model has not; on a GPU that ends in an assertion without a place.
    """
    try:
        embedding = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    except NotImplementedError:  # transformers' answer for models of sound, which take no tokens
        return
    if not isinstance(embedding, torch.nn.Embedding):
        return
    size = embedding.num_embeddings
    for task, split, dataset in ((t, s, d) for t in tasks for s, d in t.datasets.items()):
        for number, shard in enumerate(dataset.manifest.shards):
            if shard.max_token_id >= size:
                raise ValueError(
                    f"task {task.task.name}, {split}: {dataset.folder / shard.file}, row "
                    f"{dataset.row_of_largest_token(number)} of the data, holds token id "
                    f"{shard.max_token_id}, but the model has {size} embeddings: use the "
                    "tokenizer of the model, or resize its embeddings"
                )


def load_preprocessor(recipe: Recipe) -> Any:
    """Return the model's tokenizer, or what takes its place where the tasks are not of text."""
    source, takes = model_source(recipe.model), recipe.tasks[0].takes
    return load_tokenizer(source) if takes == "text" else load_processor(source, takes=takes)


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
    return [
        EvalData(
            task=t.task,
            split=split,
            dataset=t.datasets[split],
            spec=t.task.collate_spec(parts.tokenizer, evaluation=True),
            micro_batch_size=_rows_at_once(recipe, t.datasets[split]),
            generate=_generator(parts, t, recipe) if t.task.generates else None,
        )
        for t in parts.tasks
        if split in t.datasets
    ]


def _rows_at_once(recipe: Recipe, dataset: ShardedDataset) -> int:
    """Return the rows of a micro-batch of an evaluation; a row takes less than in training."""
    if recipe.evaluation.micro_batch_size is not None:
        return recipe.evaluation.micro_batch_size
    size = 2 * recipe.train.micro_batch_size
    if recipe.train.micro_batch_tokens is None:
        return size
    return min(size, max(1, 2 * recipe.train.micro_batch_tokens // int(dataset.lengths.max())))


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
