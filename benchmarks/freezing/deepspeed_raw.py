"""DeepSpeed as it comes, with `requires_grad` toggled by the user between steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import torch.distributed as dist
from torch import nn

from benchmarks.freezing import tiny
from benchmarks.freezing.outcome import Case, Recorder, Weights, copy_of
from benchmarks.freezing.tiny import Schedule, Span, TinyTransformer

# How the user freezes.
#   before: the first phase's mask is set before deepspeed.initialize, later ones toggle
#   after:  everything trains at deepspeed.initialize, every phase toggles
#   lr_zero: everything trains all the time, frozen layer groups have a learning rate of 0
#   restart: each phase builds a new engine from the weights of the last one
Way = Literal["before", "after", "lr_zero", "restart"]
WAYS: dict[Way, tuple[str, str]] = {
    "before": ("toggle, first mask before initialize", ""),
    "after": ("toggle, all masks after initialize", ""),
    "lr_zero": ("lr 0 for frozen groups", "saves nothing: memory and traffic of all layers"),
    "restart": ("new engine for each phase", "Adam's moments are lost at each change"),
}


def load() -> None:
    """Import DeepSpeed quietly, without building its extensions."""
    from dist_ft.engine.ds_setup import set_up_deepspeed

    set_up_deepspeed()


def full_weights(module: nn.Module, *, zero_stage: int) -> Weights:
    """Return whole parameters as this rank sees them."""
    import deepspeed

    parameters = dict(module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=zero_stage == 3):
        return copy_of(parameters)


def initialize(
    model: nn.Module, *, zero_stage: int, precision: str, one_group_each: bool = False
) -> Any:
    """Return the DeepSpeed engine over all parameters of `model`, frozen ones too."""
    import deepspeed

    by_group: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        key = tiny.group_of(name) if one_group_each else "all"
        by_group.setdefault(key, []).append(parameter)
    optimizer = tiny.adamw(
        [{"params": params, "layer_group": key} for key, params in by_group.items()]
    )
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": tiny.ROWS_PER_RANK,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # its default is 1.0
        "zero_optimization": {"stage": zero_stage},
        "steps_per_print": 10**9,
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine


def train_span(engine: Any, span: Span, *, first_step: int) -> None:
    """Run the steps of a phase."""
    for step in range(first_step, first_step + span.steps):
        task = span.tasks[(step - first_step) % len(span.tasks)]
        loss, _ = engine(task, *tiny.rank_batch(step, rank=dist.get_rank()))
        engine.backward(loss / tiny.ROWS_PER_RANK)
        engine.step()


def run(
    recorder: Recorder,
    *,
    schedule: Schedule,
    tasks: tuple[str, ...],
    zero_stage: int,
    precision: str,
    way: Way,
) -> None:
    """Run a schedule that every rank knows."""
    model = TinyTransformer(tasks=tasks)
    if way in ("before", "restart"):
        tiny.set_trainable(model, schedule[0].trainable)
    start = partial(
        initialize, zero_stage=zero_stage, precision=precision, one_group_each=way == "lr_zero"
    )
    engine = start(model)
    recorder.snapshots.append(full_weights(model, zero_stage=zero_stage))
    first = 0
    for span in schedule:
        if way == "restart" and first > 0:
            engine.destroy()
            model = TinyTransformer(tasks=tasks)
            model.load_state_dict(recorder.snapshots[-1])
            tiny.set_trainable(model, span.trainable)
            engine = start(model)
        elif way == "lr_zero":
            for group in engine.optimizer.param_groups:
                group["lr"] = tiny.LR if group["layer_group"] in span.trainable else 0.0
        else:
            tiny.set_trainable(model, span.trainable)
        train_span(engine, span, first_step=first)
        first += span.steps
        recorder.snapshots.append(full_weights(model, zero_stage=zero_stage))


def numpy_draws(seed: int) -> list[int]:
    """Return the blocks that LISA's callback draws from numpy's global generator."""
    np.random.seed(seed)  # noqa: NPY002 - the callbacks use the global generator
    return [
        int(np.random.choice(range(tiny.BLOCKS), 1, replace=False)[0])  # noqa: NPY002
        for _ in range(tiny.BLOCK_PERIODS)
    ]


def run_lisa(recorder: Recorder, *, zero_stage: int, seed: Callable[[int], int]) -> None:
    """Switch blocks as the published LISA callbacks do, each rank from its own numpy state.

    In step 0 and every K steps all blocks are frozen and drawn ones made trainable. Everything
    trains at deepspeed.initialize, which is better for it than freezing in the constructor.

    Args:
        recorder: Takes the weights.
        zero_stage: ZeRO stage.
        seed: Seed of a rank's generator.
    """
    own = tiny.block_schedule(numpy_draws(seed(dist.get_rank())))
    run(
        recorder,
        schedule=own,
        tasks=("a",),
        zero_stage=zero_stage,
        precision="fp32",
        way="after",
    )


def same_seed(rank: int) -> int:
    """Return the seed of ranks whose numpy states have stayed equal."""
    del rank
    return 0


def own_seed(rank: int) -> int:
    """Return the seed of ranks whose numpy states differ."""
    return rank


SEEDS = {same_seed: "same numpy seed", own_seed: "own numpy RNG per rank"}


def schedule_cases(precisions: tuple[str, ...], *, quick: bool) -> list[Case]:
    """Return raw DeepSpeed on the schedule that thaws and freezes again."""
    stages: dict[Way, tuple[int, ...]] = {
        "before": (0, 1, 2, 3),
        "after": (0, 1, 2, 3),
        "lr_zero": (2,) if quick else (0, 1, 2, 3),
        "restart": (2,) if quick else (0, 1, 2, 3),
    }
    return [
        Case(
            _labels(f"DeepSpeed, {name}", zero_stage=stage, precision=precision),
            partial(
                run,
                schedule=tiny.THAW_AND_FREEZE,
                tasks=("a",),
                zero_stage=stage,
                precision=precision,
                way=way,
            ),
            note=note,
        )
        for way, (name, note) in WAYS.items()
        for precision in precisions
        for stage in stages[way]
    ]


def lisa_cases(*, quick: bool) -> list[Case]:
    """Return LISA's callback with equal and with different draws."""
    return [
        Case(
            _labels(f"DeepSpeed, LISA callback, {name}", zero_stage=stage, precision="fp32"),
            partial(run_lisa, zero_stage=stage, seed=seed),
        )
        for seed, name in SEEDS.items()
        for stage in ((0, 2) if quick else (0, 1, 2, 3))
    ]


def head_cases() -> list[Case]:
    """Return raw DeepSpeed with two heads of which one runs in a step."""
    return [
        Case(
            _labels("DeepSpeed", zero_stage=stage, precision="fp32"),
            partial(
                run,
                schedule=tiny.HEADS,
                tasks=tiny.TASKS,
                zero_stage=stage,
                precision="fp32",
                way="after",
            ),
        )
        for stage in range(4)
    ]


def _labels(system: str, *, zero_stage: int, precision: str) -> dict[str, str]:
    return {"system": system, "setting": f"ZeRO-{zero_stage}", "precision": precision}
