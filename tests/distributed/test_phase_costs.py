"""What a phase change costs: memory, traffic, and a kill in the middle of it."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from dist_ft.engine.base import EngineOptions
from dist_ft.recipe import load_recipe
from dist_ft.train import build
from tests.helpers.phases import ALL, make_deepspeed, run
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny import TinyModel
from tests.helpers.tiny_run import state_hash, train, write_recipe

HEADS = ("head.a", "head.b")
TOP = ("block.3", *HEADS)


def _share() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def _count_bytes(stage: int) -> None:
    engine = make_deepspeed(EngineOptions(), zero_stage=stage)
    width = sum(p.numel() for p in TinyModel().parameters())
    sent: list[int] = []
    # In stages 1 and 2 a rank sends the half of the gradients that the other keeps, and then its
    # half of the weights: together as much as it sends in an all-reduce of the gradients.
    for name in ("all_reduce", "reduce_scatter_tensor", "reduce", "reduce_scatter_single", "isend"):
        original = getattr(dist, name, None)
        if original is not None:
            setattr(dist, name, _counting(original, name, sent))
    shares: dict[str, float] = {}
    for label, groups in (("all", ALL), ("top", TOP), ("all again", ALL)):
        report = engine.set_trainable(groups)
        sent.clear()
        for step in range(2):  # both heads
            run(engine, {}, steps=range(step, step + 1), micro_batches=2, share=_share())
        # Norms and flags are scalars; gradients are everything else.
        shares[label] = sum(n for n in sent if n > 64) / 2 / 4 / width
        expected = report.trainable_params / width
        # Padding to a multiple of four elements per parameter group weighs in a tiny model.
        assert abs(shares[label] - expected) <= 0.05 * expected + 0.01, (stage, label, shares)


def _counting(original: Any, name: str, sent: list[int]) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        first = kwargs.get("input", kwargs.get("tensor"))
        position = 1 if name.startswith("reduce_scatter") else 0
        tensor = args[position] if first is None else first
        sent.append(tensor.numel() * tensor.element_size())
        return original(*args, **kwargs)

    return counted


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradient_bytes_on_the_wire_follow_what_trains(stage: int) -> None:
    run_distributed(_count_bytes, stage)


# From <malloc.h>: one arena, and a mapping of its own for every buffer of 64 KiB and more, which
# goes back to the system when it is freed. As glibc tunes itself, its pages wander by 12 %.
M_ARENA_MAX, M_MMAP_THRESHOLD = -8, -3


def _tensor_bytes() -> int:
    """Return the bytes of all storages that some tensor refers to.

    What existed before the first engine is frozen while there is one, and not listed then.
    """
    for _ in range(2):  # what a finalizer lets go of is found by the next
        gc.collect()
    storages = [o.untyped_storage() for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _many_changes(variants: Any) -> None:
    libc = ctypes.CDLL(None)
    assert libc.mallopt(M_ARENA_MAX, 1)
    assert libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    process = psutil.Process()
    for stage, switch in variants:
        before = _tensor_bytes()
        engine = make_deepspeed(EngineOptions(), zero_stage=stage, switch=switch, width=256)
        tensors: list[int] = []
        resident: list[int] = []
        for change in range(50):
            engine.set_trainable(ALL if change % 2 else TOP)
            steps = range(change, change + 1)
            run(engine, {}, steps=steps, micro_batches=2, share=_share(), width=256)
            tensors.append(_tensor_bytes() if change in (10, 11, 48, 49) else 0)
            resident.append(process.memory_info().rss)
        for early, late in ((10, 48), (11, 49)):  # the top alone, and everything
            assert tensors[late] <= 1.001 * tensors[early], (stage, switch, tensors)
            assert resident[late] <= 1.02 * resident[early], (stage, switch, resident)
        engine.close()
        assert _tensor_bytes() <= before + 2**16, (stage, switch, before)


@pytest.mark.slow
def test_memory_does_not_grow_over_fifty_changes() -> None:
    variants = [(0, "rebuild"), (1, "rebuild"), (2, "rebuild"), (3, "rebuild"), (2, "in_place")]
    run_distributed(_many_changes, variants, start_method="spawn", world_size=1)


def _killed(path: Path, stage: int, change: int) -> None:
    import deepspeed

    recipe = load_recipe(path, overrides=["name=killed", f"engine.zero_stage={stage}"])
    if os.environ["RANK"] == "1":
        original, calls = deepspeed.initialize, []

        def dies(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == change:  # the old engine is gone, the new one does not exist
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        deepspeed.initialize = dies
    build.train(recipe, resume=False)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_kill_during_a_phase_change_loses_nothing(stage: int, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, checkpoint={"every": "3step"})
    train(recipe, ["name=straight", f"engine.zero_stage={stage}"])
    with pytest.raises(Exception, match=r"SIGKILL|Connection|closed by peer|terminated"):
        run_distributed(_killed, recipe, stage, 3)
    train(recipe, ["name=killed", f"engine.zero_stage={stage}"], resume=True)
    assert state_hash(tmp_path / "runs/killed") == state_hash(tmp_path / "runs/straight")
