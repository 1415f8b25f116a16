"""A plan's bytes against those of real runs on two ranks."""

import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from torch import nn
from torch.multiprocessing.spawn import start_processes
from transformers import BertConfig, BertModel

from dist_ft import dist
from dist_ft.config import Recipe
from dist_ft.engine.base import PhaseReport
from dist_ft.engine.ds_gradients import OwnedGradients
from dist_ft.freezing.schedule import Phase
from dist_ft.planning.cost import Cluster
from dist_ft.planning.hardware import HARDWARE
from dist_ft.planning.memory import memory_of
from dist_ft.planning.meta import read_shape
from dist_ft.planning.phases import schedule_of
from dist_ft.planning.settings import make_plan, setting_of
from dist_ft.recipe import load_recipe
from dist_ft.train import build
from dist_ft.train.callbacks import Watcher
from dist_ft.train.console import Console
from dist_ft.train.loop import Run, enter_phase
from dist_ft.train.parts import make_parts
from dist_ft.train.recorder import Recorder
from dist_ft.train.run_folder import RunFolder
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny_run import write_recipe
from tests.helpers.tiny_tokenizers import wordpiece

LENGTH = 32
# Of these the gradients on a CPU are measured, too: what does not train has none there.
OWN = (
    "ZeRO-1, bf16",
    "ZeRO-1, two micro-batches",
    "ZeRO-2, bf16, half frozen",
    "one block at a time",
)
SETTINGS: dict[str, list[str]] = {
    "replicated": ["engine.zero_stage=0", "freezing={policy: none}"],
    "ZeRO-1, bf16": ["engine.zero_stage=1", "engine.precision=bf16", "freezing={policy: none}"],
    "ZeRO-2, heads": ["engine.zero_stage=2"],
    "ZeRO-2, bf16, half frozen": [
        "engine.zero_stage=2",
        "engine.precision=bf16",
        "freezing={policy: static, depth: 2}",
    ],
    "ZeRO-3": ["engine.zero_stage=3", "freezing={policy: none}"],
    "ZeRO-3, bf16, half frozen": [
        "engine.zero_stage=3",
        "engine.precision=bf16",
        "freezing={policy: static, depth: 2}",
    ],
    "ZeRO-1, two micro-batches": [
        "engine.zero_stage=1",
        "train.micro_batch_size=2",
        "freezing={policy: none}",
    ],
    "one block at a time": [
        "engine.zero_stage=2",
        "engine.precision=bf16",
        "freezing={policy: random_block, blocks: 1, every: 2step}",
    ],
    "L2-SP and an average, ZeRO-2, bf16, half frozen": [
        "engine.zero_stage=2",
        "engine.precision=bf16",
        "freezing={policy: static, depth: 2}",
        "regularization={l2_sp: {strength: 0.01}, averaging: {type: ema}}",
        "optim.weight_decay=0",
    ],
    "mixout and an average, ZeRO-3, bf16, half frozen": [
        "engine.zero_stage=3",
        "engine.precision=bf16",
        "freezing={policy: static, depth: 2}",
        "regularization={mixout: 0.2, averaging: {type: swa, start: 0step}}",
    ],
    "mixout, replicated": [
        "engine.zero_stage=0",
        "freezing={policy: none}",
        "regularization={mixout: 0.2}",
    ],
    "LoRA, ZeRO-1": [
        "engine.zero_stage=1",
        "freezing={policy: none}",
        "model.lora={r: 4, target_modules: [query, value]}",
    ],
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that are all as long as they may be, and a model whose padding does not weigh."""
    folder = tmp_path_factory.mktemp("planned")
    path = write_recipe(folder)
    config = BertConfig(vocab_size=len(wordpiece()), hidden_size=64, num_hidden_layers=4,
                        num_attention_heads=2, intermediate_size=128,
                        max_position_embeddings=64)  # fmt: skip
    BertModel(config).save_pretrained(folder / "model")
    rows = [
        {"text": f"{'ada wrote the program ' * 12} {i}", "label": str(i % 2)} for i in range(40)
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    body = yaml.safe_load(path.read_text())
    body["tasks"] = [{**body["tasks"][0], "max_length": LENGTH, "labels": ["0", "1"]}]
    path.write_text(yaml.safe_dump(body))
    return path


def _weights(module: nn.Module) -> Iterator[torch.Tensor]:
    for parameter in module.parameters():
        yield getattr(parameter, "ds_tensor", parameter)


def _nbytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _gradients(engine: Any, *, stage: int) -> list[torch.Tensor]:
    whole = [p.grad for p in engine.module.parameters() if p.grad is not None]
    if stage == 0:
        return whole
    if stage == 3:
        return [engine.optimizer.grad_partitions_flat_buffer]
    averaged = engine.optimizer.averaged_gradients.values()
    return whole + [t for tensors in averaged for t in tensors or ()]


def _measure(run: Run, report: PhaseReport, *, stage: int) -> dict[str, int]:
    """Return what one rank holds in the first phase, and what a step of it keeps."""
    engine: Any = run.engine
    inner, found, kept = engine._engine, {"gradients": 0, "mixed": 0}, {}
    ours = {t.untyped_storage().data_ptr() for t in _weights(engine.module)}

    def watch(method: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            now = _nbytes(_gradients(inner, stage=stage))
            found["gradients"] = max(found["gradients"], now)
            mixed = _nbytes(true for _, true in engine._mixing._true)
            found["mixed"] = max(found["mixed"], mixed)
            return method(*args, **kwargs)

        return watched

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        parameter = isinstance(tensor, nn.Parameter) or hasattr(tensor._base, "ds_id")
        if not parameter and storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    inner.step, inner.backward = watch(inner.step), watch(inner.backward)
    if (own := engine._stepper.gradients) is not None:  # in the place of DeepSpeed's backward pass
        own.backward = watch(own.backward)
    if engine._stepper._step is not None:  # and of its step
        engine._stepper._step.apply = watch(engine._stepper._step.apply)
    batch = next(run.loader.iterate(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        engine.train_step(
            0,
            task=batch.task,
            micro_batches=batch.micro_batches,
            global_count=batch.global_count,
            learning_rates=run.learning_rates(0, {}),
        )
    averages = _nbytes(t for tensors in engine._average._values.values() for t in tensors)
    return found | {
        "regularization": report.anchor_bytes + found.pop("mixed") + averages,
        "parameters": _nbytes(_weights(engine.module)),
        "optimizer": report.optimizer_bytes,
        "trainable": report.trainable_params,
        "activations": sum(size for size, _ in kept.values()) // len(batch.micro_batches),
    }


def _compare(path: Path) -> None:
    found: dict[str, dict[str, float]] = {}
    for name, overrides in SETTINGS.items():
        # A plan counts what padded blocks keep, and says so.
        recipe = load_recipe(path, overrides=[*overrides, "model.padding=padded"])
        # Planned is what DeepSpeed keeps, as on a GPU.
        with mock.patch.object(OwnedGradients, "of", return_value=None):
            found[name] = _errors(recipe, path.parent)
        if name in OWN:
            found[name]["on a CPU"] = _errors(recipe, path.parent)["gradients"]
    if torch.distributed.get_rank() == 0:
        (path.parent / "errors.json").write_text(json.dumps(found))


def _make_run(recipe: Recipe, folder: Path, *, world: dist.World) -> Run:
    parts = make_parts(recipe, lambda _: None)
    return build.make_run(
        recipe, parts, folder=RunFolder(folder / "runs"), world=world,
        device=torch.device("cpu"), console=Console(main=False), recorder=Recorder(None),
    )  # fmt: skip


def _errors(recipe: Recipe, folder: Path) -> dict[str, float]:
    world = dist.world_from_environment()
    run = _make_run(recipe, folder, world=world)
    reports: list[PhaseReport] = []
    run.callbacks = [_Remember(reports)]
    enter_phase(run, run.policy.phase_at(0))
    measured = _measure(run, reports[0], stage=recipe.engine.zero_stage)
    planned = _plan(recipe, world_size=world.world_size)
    rules = recipe.regularization
    assert bool(measured["regularization"]) == any((rules.l2_sp, rules.mixout, rules.averaging))
    return {
        # Nothing planned where nothing was measured is right, too.
        key: planned[key] / value - 1 if value or planned[key] else 0.0
        for key, value in measured.items()
    }


class _Remember(Watcher):
    def __init__(self, reports: list[PhaseReport]) -> None:
        self._reports = reports

    def on_phase(self, run: Run, phase: Phase, report: PhaseReport) -> None:
        del run, phase
        self._reports.append(report)


def _plan(recipe: Recipe, *, world_size: int) -> dict[str, int]:
    shape = read_shape(recipe, on_gpu=False)
    schedule = schedule_of(recipe, shape)
    setting = setting_of(recipe, schedule, world_size=world_size)
    trainable = schedule.phases[0].trainable
    memory = memory_of(
        shape, trainable=trainable, universe=schedule.universe, setting=setting, on_gpu=False
    )
    return {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "regularization": memory.regularization,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "trainable": shape.numel_of(trainable),
    }


EXPLICIT = (
    "freezing={policy: explicit, phases: [{at: 0step, trainable: [block.0, head.*]}, "
    "{at: 2step, trainable: [block.1, block.2, head.*]}]}"
)
KEEPING = {
    "fp32": [],
    "bf16": ["engine.precision=bf16"],
    "bf16, in place": ["engine.precision=bf16", "freezing.switch=in_place"],
}


def _compare_what_is_kept(path: Path) -> None:
    """Compare with what waits on the host, and is saved, of groups that trained before."""
    world = dist.world_from_environment()
    for name, overrides in KEEPING.items():
        recipe = load_recipe(path, overrides=[EXPLICIT, *overrides])
        run = _make_run(recipe, path.parent, world=world)
        reports: list[PhaseReport] = []
        run.callbacks = [_Remember(reports)]
        batches = run.loader.iterate(0)
        for start in (0, 2):
            enter_phase(run, run.policy.phase_at(start))
            batch = next(batches)
            run.engine.train_step(
                start,
                task=batch.task,
                micro_batches=batch.micro_batches,
                global_count=batch.global_count,
                learning_rates=run.learning_rates(start, {}),
            )
        batches.close()
        mine = _nbytes(t for s in run.engine.state().slices for t in s.values.values())
        (saved,) = dist.all_reduce_sum([float(mine)])
        shape = read_shape(recipe, on_gpu=False)
        schedule = schedule_of(recipe, shape)
        setting = setting_of(recipe, schedule, world_size=world.world_size)
        cluster = Cluster(HARDWARE["cpu-8g"], nodes=1, per_node=world.world_size)
        plan = make_plan(shape, schedule=schedule, setting=setting, cluster=cluster)
        assert saved == plan.checkpoint_bytes, name
        planned = [p.memory.host for p in plan.phases]
        assert [r.parked_bytes for r in reports] == planned, name
        assert planned[1] > 0


def test_what_is_kept_of_groups_that_trained_before_is_planned(recipe: Path) -> None:
    run_distributed(_compare_what_is_kept, recipe)


WORLD = 512


def _in_a_large_world(_index: int, path: Path) -> None:
    """Compare rank 0 of many ranks that do not exist: torch's fake process group moves nothing."""
    store = importlib.import_module("torch.testing._internal.distributed.fake_pg").FakeStore()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(WORLD))
    torch.distributed.init_process_group("fake", store=store, rank=0, world_size=WORLD)
    for stage in (1, 2, 3):
        recipe = load_recipe(
            path,
            overrides=[
                f"engine.zero_stage={stage}",
                "engine.precision=bf16",
                f"train.global_batch_size={4 * WORLD}",
                "freezing={policy: static, depth: 2}",
            ],
        )
        run = _make_run(recipe, path.parent, world=dist.World(0, 0, WORLD))
        report = run.engine.set_trainable(run.policy.phase_at(0).trainable)
        planned = _plan(recipe, world_size=WORLD)
        assert report.optimizer_bytes == planned["optimizer"], stage
        assert report.trainable_params == planned["trainable"]
        assert _nbytes(_weights(run.engine.module)) == planned["parameters"], stage


def test_planned_bytes_of_512_ranks(recipe: Path) -> None:
    start_processes(_in_a_large_world, args=(recipe,), nprocs=1, start_method="fork")


def test_planned_bytes_are_those_of_runs(recipe: Path) -> None:
    run_distributed(_compare, recipe)
    errors = json.loads((recipe.parent / "errors.json").read_text())
    assert set(errors) == set(SETTINGS)
    for name, found in errors.items():
        # Measured: 0 for everything but the activations, 0.4 % there. The rest is for versions.
        assert abs(found.pop("activations")) <= 0.02, (name, errors[name])
        on_cpu = found.pop("on a CPU", 0.0)
        if name == "one block at a time":
            assert on_cpu > 1, "planned is more than twice what a CPU keeps"
        else:
            assert abs(on_cpu) <= 1e-6, (name, on_cpu)
        assert all(abs(e) <= 1e-6 for e in found.values()), (name, found)
        assert set(found) == {"parameters", "gradients", "optimizer", "trainable", "regularization"}
