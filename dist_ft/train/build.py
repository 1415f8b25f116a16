"""The composition root: puts the parts of a run together from its recipe."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dist_ft import dist
from dist_ft.config import Recipe
from dist_ft.duration import Duration
from dist_ft.engine.base import Engine, EngineOptions
from dist_ft.engine.ds_config import DeepSpeedOptions
from dist_ft.engine.layer_modes import LayerModes
from dist_ft.engine.loss_module import LossModule
from dist_ft.engine.reference import ReferenceEngine
from dist_ft.model.backbone import load_tokenizer
from dist_ft.model.layer_groups import LayerGroup
from dist_ft.optim.lr_schedules import LrSchedule, thaw_factor
from dist_ft.optim.param_groups import LearningRates, ParamGroup, build_param_groups
from dist_ft.train.adapt import WatchGroups
from dist_ft.train.callbacks import Checkpoint, Evaluate, LogSteps
from dist_ft.train.checkpoint import CheckpointReader, find_checkpoint, set_aside
from dist_ft.train.console import Console
from dist_ft.train.data import prepare_tasks
from dist_ft.train.deciders import deciders
from dist_ft.train.loading import make_loader
from dist_ft.train.loop import Progress, Run, fit
from dist_ft.train.mix import FollowLosses
from dist_ft.train.parts import Parts, eval_data, make_parts, model_source
from dist_ft.train.recorder import Recorder
from dist_ft.train.run_folder import RunFolder, environment
from dist_ft.train.signals import StopRequest

log = logging.getLogger("dist_ft")

DONE, PREEMPTED = 0, 75


def prepare(recipe: Recipe) -> None:
    """Turn the recipe's data into shards, saying what becomes of each split."""
    console = Console(main=True)
    prepare_tasks(
        recipe,
        tokenizer=load_tokenizer(model_source(recipe.model)),
        say=console.say,
        reading=console.reading,
    )


def train(recipe: Recipe, *, resume: bool) -> int:
    """Train on this rank; return the exit code.

    Args:
        recipe: A loaded recipe.
        resume: Go on from the newest whole checkpoint, if there is one.

    Raises:
        ValueError: If the recipe does not fit the model, the data or the number of ranks.
    """
    stop = StopRequest()
    with stop.listening():
        return _train(recipe, resume=resume, stop=stop)


def _train(recipe: Recipe, *, resume: bool, stop: StopRequest) -> int:
    world = dist.world_from_environment()
    check_world(recipe, world)
    console = Console(main=world.is_main, every=recipe.logging.every)
    folder = RunFolder(recipe.output_dir / recipe.name)
    parts = make_parts(recipe, console.say)
    device = dist.init_process_group(world, timeout_s=recipe.engine.collective_timeout_s)
    try:
        _open_folder(folder, recipe, resume=resume, world=world, device=device)
        folder.log_to_file(world)
        recorder = Recorder(folder.metrics if world.is_main else None)
        run = make_run(recipe, parts, folder=folder, world=world, device=device,
                       console=console, recorder=recorder)  # fmt: skip
        if resume:
            restore(run, folder=folder, recorder=recorder, console=console)
        run.stop_signal = lambda: stop.signal
        fit(run)
        return finish(run, recorder=recorder, console=console)
    finally:
        dist.shut_down()


def check_world(recipe: Recipe, world: dist.World) -> None:
    """Check that the global batch can be shared out over the ranks.

    Raises:
        ValueError: If it cannot, or the reference engine is to run on several ranks.
    """
    micro_batches = recipe.train.global_batch_size // recipe.train.micro_batch_size
    if recipe.train.micro_batch_tokens is not None:
        # As many micro-batches as ranks can always be made, down to one row each.
        if recipe.train.global_batch_size < world.world_size:
            raise ValueError(
                f"train.global_batch_size: {recipe.train.global_batch_size} rows are too few for "
                f"{world.world_size} ranks: start fewer ranks or raise it"
            )
    elif micro_batches % world.world_size:
        fits = [n for n in range(1, micro_batches + 1) if micro_batches % n == 0]
        raise ValueError(
            f"train.global_batch_size: {recipe.train.global_batch_size} rows in micro-batches of "
            f"{recipe.train.micro_batch_size} make {micro_batches} micro-batches, which cannot be "
            f"shared equally by {world.world_size} ranks: start {' or '.join(map(str, fits))} "
            "ranks or change a batch size"
        )
    if recipe.engine.type == "reference" and world.world_size > 1:
        raise ValueError(
            f"engine.type: reference runs on one rank, got {world.world_size}: use deepspeed"
        )


def _open_folder(
    folder: RunFolder, recipe: Recipe, *, resume: bool, world: dist.World, device: torch.device
) -> None:
    problem: str | None = None
    if world.is_main:
        try:
            folder.start(recipe.model_dump(mode="json"), resume=resume)
            folder.write_json("env.json", environment(world, device))
        except ValueError as error:
            problem = str(error)
    # Every rank must hear of it, or the others would wait in their first collective.
    problem = dist.broadcast_object(problem)
    if problem is not None:
        raise ValueError(problem)


def make_run(
    recipe: Recipe,
    parts: Parts,
    *,
    folder: RunFolder,
    world: dist.World,
    device: torch.device,
    console: Console,
    recorder: Recorder,
) -> Run:
    """Return the run with engine, loader and callbacks."""
    param_groups = build_param_groups(
        parts.groups,
        dimensions={n: p.dim() for n, p in parts.model.named_parameters()},
        rates=LearningRates(recipe.optim.lr, recipe.optim.head_lr, recipe.optim.layer_decay),
        weight_decay=recipe.optim.weight_decay,
    )
    module = LossModule(parts.model, {t.task.name: t.task.loss for t in parts.tasks}).to(device)
    engine = make_engine(recipe, parts, module=module, param_groups=param_groups, world=world)
    loader = make_loader(
        recipe,
        parts.tasks,
        tokenizer=parts.tokenizer,
        mixture=parts.mixture,
        rank=world.rank,
        world_size=world.world_size,
    )
    run = Run(
        engine=engine,
        loader=loader,
        policy=parts.policy,
        learning_rates=_learning_rates(recipe, parts, param_groups),
        trainable_now=lambda: trainable_groups(module, parts.groups),
        total_steps=parts.total_steps,
    )
    run.callbacks = _callbacks(recipe, parts, folder, world, console, recorder)
    return run


def _learning_rates(
    recipe: Recipe, parts: Parts, param_groups: Sequence[ParamGroup]
) -> Callable[[int, Mapping[str, int]], dict[str, float]]:
    config = recipe.optim.schedule
    schedule = LrSchedule(
        config.type,
        total_steps=parts.total_steps,
        warmup_steps=parts.lengths.steps(config.warmup),
        min_ratio=config.min_ratio,
    )
    thaw_steps = parts.lengths.steps(recipe.optim.unfreeze_warmup)
    peaks = {g.layer_group: g.lr for g in param_groups}

    def rates(step: int, thawed_at: Mapping[str, int]) -> dict[str, float]:
        factor = schedule.factor(step)
        return {
            name: peak
            * factor
            * thaw_factor(step, thawed_at=thawed_at.get(name, 0), warmup_steps=thaw_steps)
            for name, peak in peaks.items()
        }

    return rates


def trainable_groups(module: torch.nn.Module, groups: Sequence[LayerGroup]) -> tuple[str, ...]:
    """Return the layer groups whose parameters require a gradient, read from the parameters."""
    needs = {n.removeprefix("model."): p.requires_grad for n, p in module.named_parameters()}
    return tuple(g.name for g in groups if any(needs[n] for n in g.parameters))


def make_engine(
    recipe: Recipe,
    parts: Parts,
    *,
    module: LossModule,
    param_groups: Sequence[ParamGroup],
    world: dist.World,
) -> Engine:
    """Return the engine that the recipe asks for."""
    options = EngineOptions(
        precision=recipe.engine.precision,
        max_grad_norm=recipe.optim.max_grad_norm,
        betas=recipe.optim.betas,
        eps=recipe.optim.eps,
        seed=recipe.seed,
        returning=recipe.freezing.returning,
    )
    modes = LayerModes.of(
        parts.model,
        groups=parts.groups,
        checkpointing=recipe.model.activation_checkpointing,
        prefix_dropout=recipe.freezing.prefix_dropout,
    )
    if recipe.engine.type == "reference":
        return ReferenceEngine(module, param_groups=param_groups, options=options, modes=modes)
    # Imported here: it takes seconds, and the reference engine does without.
    from dist_ft.engine.deepspeed_engine import DeepSpeedEngine

    size = recipe.train.micro_batch_size
    if recipe.train.micro_batch_tokens is not None:
        # Micro-batches differ in rows, and steps in micro-batches: the engine itself says which is
        # a step's last, and DeepSpeed only wants numbers.
        size = min(size, recipe.train.global_batch_size // world.world_size)
    base = recipe.engine.deepspeed
    switch = recipe.freezing.switch
    engine = DeepSpeedEngine(
        module,
        param_groups=param_groups,
        options=options,
        deepspeed_options=DeepSpeedOptions(
            zero_stage=recipe.engine.zero_stage,
            micro_batch_size=size,
            gradient_accumulation_steps=max(
                1, recipe.train.global_batch_size // (size * world.world_size)
            ),
            offload_optimizer=recipe.engine.offload_optimizer,
            base=None if base is None else json.loads(base.read_text()),
        ),
        switch=parts.policy.suits() if switch == "auto" else switch,
        modes=modes,
    )
    engine.limit_universe(parts.policy.universe())
    return engine


def _callbacks(
    recipe: Recipe,
    parts: Parts,
    folder: RunFolder,
    world: dist.World,
    console: Console,
    recorder: Recorder,
) -> list[Any]:
    def interval(duration: Duration | None) -> int | None:
        return None if duration is None else max(1, parts.lengths.steps(duration))

    evaluate = Evaluate(
        recorder=recorder,
        console=console,
        world=world,
        data=eval_data(recipe, parts, split="validation"),
        every=interval(recipe.evaluation.every),
    )
    checkpoint = Checkpoint(
        recorder=recorder,
        console=console,
        folder=folder.checkpoints,
        every=interval(recipe.checkpoint.every),
        keep_last=recipe.checkpoint.keep_last,
        describe=lambda: {
            "world_size": world.world_size,
            "zero_stage": recipe.engine.zero_stage,
            "precision": recipe.engine.precision,
        },
    )
    steps = LogSteps(recorder=recorder, console=console, world=world, every=recipe.logging.every)
    groups = WatchGroups(
        recorder=recorder,
        every=recipe.logging.groups_every or 10 * recipe.logging.every,
        layer_group_of={name: g.name for g in parts.groups for name in g.parameters},
    )
    # A decision is part of the checkpoint of its step.
    return [steps, groups, evaluate, *deciders(recipe, parts, evaluate), checkpoint]


def restore(run: Run, *, folder: RunFolder, recorder: Recorder, console: Console) -> None:
    """Bring a run back to its newest whole checkpoint, if there is one.

    The order matters: progress, then the phase, then the engine's state, then the data; the loop
    starts the iterator only afterwards.
    """
    path, passed_over = find_checkpoint(folder.checkpoints)
    for text in passed_over:
        console.say(f"checkpoint passed over: {text}")
    if dist.rank() == 0:
        set_aside(folder.checkpoints, [text.split(":")[0] for text in passed_over])
    if path is None:
        recorder.event("resume", step=0, path=None)
        console.say(f"{folder.root} has no checkpoint: training starts at step 0")
        return
    reader = CheckpointReader(path)
    run.progress = Progress(**reader.trainer["progress"])
    run.policy.load_state_dict(reader.trainer["policy"])
    run.engine.set_trainable(reader.trainer["trainable"])
    run.engine.load_state(reader)
    for callback in run.callbacks:
        if isinstance(callback, FollowLosses):
            # What it has decided is part of the order that is compared.
            callback.mixture.load_state(reader.trainer["data"]["mixture"])
    run.loader.check_state(reader.trainer["data"])
    for callback in run.callbacks:
        if isinstance(callback, Checkpoint):
            callback.saved_at = run.progress.step
    recorder.event("resume", step=run.progress.step, path=path.name)
    console.say(f"step {run.progress.step}: resumed from {path.name}")


def finish(run: Run, *, recorder: Recorder, console: Console) -> int:
    """Write how the run ended; return the exit code."""
    if run.stopped_by:
        recorder.event("stop", step=run.progress.step, signal=run.stopped_by)
        console.say(
            f"step {run.progress.step}: stopped by signal {run.stopped_by}"
            f"{' after saving' if run.progress.phase >= 0 else ''}; "
            "start the same command with --resume to go on"
        )
        recorder.close()
        return PREEMPTED
    recorder.event("end", step=run.progress.step)
    recorder.close()
    return DONE
