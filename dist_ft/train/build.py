"""The composition root: puts the parts of a run together from its recipe."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from dist_ft import dist
from dist_ft.config import Recipe
from dist_ft.data.bandit import BanditMixture
from dist_ft.data.fingerprint import tokenizer_fingerprint
from dist_ft.duration import Duration
from dist_ft.engine.loss_module import LossModule
from dist_ft.heartbeat import Heartbeat, noting_errors
from dist_ft.model.layer_groups import LayerGroup
from dist_ft.optim.param_groups import LearningRates, build_param_groups
from dist_ft.recipe.ranks import check_ranks
from dist_ft.train.adapt import WatchGroups
from dist_ft.train.balancing import Balance, make_balancer
from dist_ft.train.beats import make_beat
from dist_ft.train.best import Decision, TrackBest
from dist_ft.train.callbacks import Checkpoint, Evaluate
from dist_ft.train.console import Console
from dist_ft.train.deciders import deciders
from dist_ft.train.ending import closing_trackers, finish, freed, train_to_end
from dist_ft.train.engines import make_engine
from dist_ft.train.environment import environment
from dist_ft.train.extensions import NO_EXTENSIONS, Extensions
from dist_ft.train.freeze_plan import reach_text
from dist_ft.train.held_rows import with_frozen_rows
from dist_ft.train.kernels import settle, take_kernels
from dist_ft.train.loading import make_loader
from dist_ft.train.log_steps import LogSteps
from dist_ft.train.loop import Run
from dist_ft.train.memory import fit_memory
from dist_ft.train.numbers import GuardNumbers
from dist_ft.train.objectives import in_training
from dist_ft.train.parts import Parts, eval_data, make_parts
from dist_ft.train.rates import learning_rates
from dist_ft.train.recorder import Recorder
from dist_ft.train.regularization import penalty_rules
from dist_ft.train.restoring import go_back, restore
from dist_ft.train.retention import Retention
from dist_ft.train.run_data import keep_data
from dist_ft.train.run_folder import RunFolder
from dist_ft.train.run_lock import RunLock
from dist_ft.train.saving import CheckpointWriter
from dist_ft.train.shared_folder import check_same_data, check_shared
from dist_ft.train.signals import StopRequest
from dist_ft.train.stragglers import slow_ranks
from dist_ft.train.trackers import make_trackers
from dist_ft.train.trunk_passes import make_passes, reads_ahead

log = logging.getLogger("dist_ft")

# Set by the launcher for ranks that are started again: what went wrong, as JSON.
FAILURE = "DIST_FT_FAILURE"
# Places in a run at which the record says what the mixture plans, for the report.
PLAN_MARKS = 20


def train(recipe: Recipe, *, resume: bool, extensions: Extensions = NO_EXTENSIONS) -> int:
    """Train on this rank; return the exit code.

    Args:
        recipe: A loaded recipe.
        resume: Go on from the newest whole checkpoint, if there is one.
        extensions: A program's own tasks and freezing policy.

    Raises:
        ValueError: If the recipe does not fit the model, the data or the number of ranks.
    """
    stop = StopRequest()
    with stop.listening():
        return _train(recipe, resume=resume, stop=stop, extensions=extensions)


def _train(recipe: Recipe, *, resume: bool, stop: StopRequest, extensions: Extensions) -> int:
    heartbeat = Heartbeat.of_this_rank()
    world = dist.world_from_environment()
    check_ranks(recipe, world.world_size)
    console = Console(main=world.is_main, every=recipe.logging.every)
    folder = RunFolder(recipe.output_dir / recipe.name)
    if world.world_size == 1:  # the launcher does it for several ranks, before they start
        folder.check(recipe.model_dump(mode="json"), resume=resume)
    parts = make_parts(
        recipe,
        console.say,
        extensions=extensions,
        of_run=folder if resume else None,
        goes_on=resume,
    )
    reach = reach_text(recipe.freezing, parts)
    with ExitStack() as at_end, noting_errors():
        limits = recipe.engine
        device = at_end.enter_context(
            dist.process_group(
                world,
                timeout_s=limits.collective_timeout_s,
                join_timeout_s=limits.join_timeout_s,
            )
        )
        lock = RunLock(folder.root)
        at_end.callback(lock.release)
        _open_folder(folder, recipe, parts, lock=lock, resume=resume, device=device)
        at_end.enter_context(folder.logging_to_file(world))
        recorder = _recorder(recipe, folder=folder, world=world)
        at_end.push(closing_trackers(recorder, alone=world.world_size == 1))
        at_end.callback(console.stop)
        memory = fit_memory(recipe, parts, folder=folder, recorder=recorder, console=console)
        if resume:
            recipe = memory.resume(recipe)
        run = make_run(recipe, parts, folder=folder, world=world, device=device,
                       console=console, recorder=recorder)  # fmt: skip
        at_end.enter_context(freed(run, alone=world.world_size == 1))
        run.replan = memory.replan
        beat = make_beat(recipe, run, heartbeat)
        beat("start")
        _record_failure(recorder)
        if resume:
            restore(run, folder=folder, recorder=recorder, console=console)
        run.stop_signal = lambda: stop.signal
        run.beat = beat
        console.begin_run(recipe, total_steps=run.total_steps, world_size=world.world_size,
                          device=device.type, folder=folder.root)  # fmt: skip
        if reach is not None:
            console.say(reach)
        train_to_end(run, memory)
        return finish(run, recorder=recorder, console=console, folder=folder.root)


def _record_failure(recorder: Recorder) -> None:
    """Write why the launcher has started these ranks again."""
    text = os.environ.get(FAILURE)
    if text is not None:
        failure = json.loads(text)
        recorder.event("failure", **failure)


def _open_folder(
    folder: RunFolder,
    recipe: Recipe,
    parts: Parts,
    *,
    lock: RunLock,
    resume: bool,
    device: torch.device,
) -> None:
    def open_folder() -> None:
        resolved = recipe.model_dump(mode="json")
        folder.start(resolved, resume=resume)
        keep_data(folder, recipe, parts.tasks)
        folder.goes_on(resolved)
        folder.write_json("env.json", environment(dist.world_from_environment(), device))

    # Every rank must hear of what is wrong, or the others would wait in their first collective.
    dist.on_main(lock.acquire)
    check_shared(folder.root)
    check_same_data(parts.tasks, data_dir=recipe.data_dir)
    dist.on_main(open_folder)


def _recorder(recipe: Recipe, *, folder: RunFolder, world: dist.World) -> Recorder:
    if not world.is_main:
        return Recorder(None)
    trackers = make_trackers(
        recipe.logging.trackers,
        folder=folder.root,
        name=recipe.name,
        recipe=recipe.model_dump(mode="json"),
        goes_on=folder.metrics.exists(),
    )
    return Recorder(folder.metrics, trackers=trackers)


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
        penalties=penalty_rules(recipe, parts.groups, fresh=parts.model.fresh),
    )
    param_groups = with_frozen_rows(param_groups, recipe, model=parts.model)
    tasks = [t.task for t in parts.tasks]
    names = [task.name for task in tasks]
    balancer = make_balancer(recipe.balancing, tasks=names)
    kernels = take_kernels(
        recipe, parts.model, groups=parts.groups, tasks=tasks, device=device, say=console.say
    )
    weights = dict.fromkeys(names, 1.0) | getattr(recipe.balancing, "weights", {})
    extra = in_training(recipe, parts, weights=weights)
    module = LossModule(
        parts.model,
        {task.name: task.loss for task in tasks},
        in_training=kernels.used_in(extra),
    ).to(device)
    passes = make_passes(
        recipe, parts, folder=folder, device=device, say=console.say, recorder=recorder
    )
    settle(kernels, passes)
    engine = make_engine(recipe, parts, module=module, param_groups=param_groups, passes=passes)
    loader = make_loader(
        recipe,
        parts.tasks,
        tokenizer=parts.tokenizer,
        mixture=parts.mixture,
        rank=world.rank,
        world_size=world.world_size,
        on_read=reads_ahead(passes, turns=parts.turns, device=device),
    )
    run = Run(
        engine=engine,
        loader=loader,
        policy=parts.policy,
        learning_rates=learning_rates(recipe, parts, param_groups),
        trainable_now=TrainableGroups(module, parts.groups),
        total_steps=parts.total_steps,
        discard=passes.discard,
        balancer=balancer,
    )
    log.info("kernels: %s", kernels.chosen)
    if world.is_main:
        folder.add_to_environment({"kernels": kernels.chosen})
    run.callbacks = _callbacks(recipe, parts, folder, world, console, recorder)
    steps = next(c for c in run.callbacks if isinstance(c, LogSteps))
    steps.about = {**_about(parts, world), "kernels": kernels.chosen}
    next(c for c in run.callbacks if isinstance(c, Checkpoint)).on_saved = passes.saved
    guard = next(c for c in run.callbacks if isinstance(c, GuardNumbers))
    run.loss_limit = lambda task: guard.loss_limit(run, task)
    if balancer is not None:
        balance = Balance(balancer, weights, recorder, recipe.logging.every)
        # After the guard, who may go back, and before the checkpoint.
        run.callbacks.insert(run.callbacks.index(guard) + 1, balance)
    return run


class TrainableGroups:
    """Reads from the parameters which layer groups require a gradient.

    Where the parameters are is looked up once, not by a walk through all modules in every step.
    """

    def __init__(self, module: torch.nn.Module, groups: Sequence[LayerGroup]) -> None:
        """Look up the parameters of the groups in the engine's module."""
        model = module.get_submodule("model")
        self._places = {
            g.name: [
                (model.get_submodule(path), name)
                for path, _, name in (n.rpartition(".") for n in g.parameters)
            ]
            for g in groups
        }

    def __call__(self) -> tuple[str, ...]:
        """Return the groups of which some parameter requires a gradient now."""
        return tuple(
            group
            for group, places in self._places.items()
            if any(getattr(owner, name).requires_grad for owner, name in places)
        )


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
    decision = Decision(recipe.evaluation.decide_by, recipe.evaluation.weights)

    def deciding(step: int) -> dict[str, float]:
        return decision.scores(evaluate.deciding_scores(step))

    tokenizer = tokenizer_fingerprint(parts.tokenizer)
    checkpoint = Checkpoint(
        recorder=recorder,
        console=console,
        writer=CheckpointWriter(
            folder.checkpoints,
            retention=Retention(
                keep_last=recipe.checkpoint.keep_last,
                keep_every=interval(recipe.checkpoint.keep_every),
                keep_best=recipe.checkpoint.keep_best,
            ),
        ),
        every=interval(recipe.checkpoint.every),
        keep_every=interval(recipe.checkpoint.keep_every),
        ephemeral_every=interval(recipe.checkpoint.ephemeral_every),
        in_background=recipe.checkpoint.in_background,
        scores=deciding,
        describe=lambda: {
            "world_size": world.world_size,
            "zero_stage": recipe.engine.zero_stage,
            "precision": recipe.engine.precision,
            "tokenizer": tokenizer,
        },
    )
    steps = LogSteps(
        recorder=recorder,
        console=console,
        world=world,
        every=recipe.logging.every,
        slow_ranks=slow_ranks(recipe.supervision, recorder=recorder, console=console),
    )
    groups = WatchGroups(
        recorder=recorder,
        every=recipe.logging.groups_every or 10 * recipe.logging.every,
        layer_group_of={name: g.name for g in parts.groups for name in g.parameters},
    )
    guard = GuardNumbers(
        recorder=recorder,
        console=console,
        config=recipe.train.on_bad_numbers,
        go_back=lambda run: go_back(run, checkpoint=checkpoint, folder=folder),
    )
    stopping = recipe.evaluation.early_stopping
    best = TrackBest(
        recorder=recorder,
        console=console,
        scores=deciding,
        checkpoint=checkpoint if recipe.checkpoint.keep_best else None,
        patience=None if stopping is None else stopping.patience,
        min_delta=0.0 if stopping is None else stopping.min_delta,
    )
    # A decision is part of the checkpoint of its step.
    return [steps, groups, guard, evaluate, *deciders(recipe, parts, evaluate), best, checkpoint]


def _about(parts: Parts, world: dist.World) -> dict[str, Any]:
    """Return what the ``start`` event says of ranks, layer groups, and the mixture's own plan."""
    numel = {name: p.numel() for name, p in parts.model.named_parameters()}
    marks = sorted({parts.total_steps * i // PLAN_MARKS for i in range(1, PLAN_MARKS + 1)} - {0})
    if isinstance(parts.mixture, BanditMixture):
        # The rest is decided while training runs, and told by `mixture` events.
        marks = [step for step in marks if step <= parts.mixture.decided_steps]
    drawn = [parts.mixture.steps_before(step * parts.turns) for step in marks]
    return {
        "world_size": world.world_size,
        "mixture_plan": {
            "steps": marks,
            "tasks": {
                t.task.name: [counts[i] for counts in drawn] for i, t in enumerate(parts.tasks)
            },
        },
        "train_rows": {t.task.name: len(t.datasets["train"]) for t in parts.tasks},
        "layer_groups": {g.name: sum(numel[n] for n in g.parameters) for g in parts.groups},
    }
