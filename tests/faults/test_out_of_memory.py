"""A device that runs out of memory on one rank: all ranks do the same step in smaller pieces."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers.models.bert.modeling_bert import BertLayer

from dist_ft.dist import World
from dist_ft.engine.base import EngineOptions, Precision, StepResult
from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
from dist_ft.engine.loss_module import LossModule
from dist_ft.launcher.host_memory import memory_limit, oom_kills
from dist_ft.recipe import load_recipe
from dist_ft.train import evaluate as evaluation
from dist_ft.train.callbacks import Evaluate
from dist_ft.train.console import Console
from dist_ft.train.evaluate import EvalData
from dist_ft.train.loop import Progress
from dist_ft.train.memory import FitMemory, Portion, ReplannedError
from dist_ft.train.recorder import Recorder
from tests.helpers.phases import (
    ALL,
    bitwise_equal,
    largest_difference,
    make_deepspeed,
    make_reference,
)
from tests.helpers.run_distributed import run_distributed
from tests.helpers.supervised import before, supervise
from tests.helpers.tiny import TASKS, TinyBatch, TinyModel, global_batch, learning_rates
from tests.helpers.tiny import param_groups as tiny_groups
from tests.helpers.tiny_run import events, newest_checkpoint, write_recipe

# Every block trains from the start, so that each has a backward pass.
UNFROZEN = "freezing={policy: none}"
FULL = "fake allocator: no room for 2.00 GiB"
# Where all ranks stay in step: (ZeRO stage, pass in which memory ends).
IN_STEP = [(0, "forward"), (0, "backward"), (1, "forward"), (1, "backward"), (2, "forward")]


def _no_room(*_: Any) -> None:
    raise torch.OutOfMemoryError(FULL)


def _fill(block: Any, where: str) -> Callable[[], None]:
    """Let memory end in a block's next forward or backward pass; return what takes that back."""
    if where == "forward":
        return block.register_forward_pre_hook(_no_room).remove

    def hook(_module: Any, _inputs: Any, out: Tensor) -> None:
        out.register_hook(_no_room)

    return block.register_forward_hook(hook).remove


def _halves(batches: list[TinyBatch]) -> list[TinyBatch]:
    return [
        TinyBatch(
            {"input_ids": b.inputs["input_ids"][part]}, {"y": b.targets["y"][part]}, 2 * b.index + n
        )
        for b in batches
        for n, part in enumerate((slice(0, 2), slice(2, 4)))
    ]


def _step_without_room(engine: Any, step: int, *, where: str, **kwargs: Any) -> StepResult:
    """Take a step in whose second micro-batch memory ends; the first one's gradients are there."""
    blocks, calls, remove = engine.module.blocks, [0], list[Callable[[], None]]()

    def count(_module: Any, _inputs: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            remove.append(_fill(blocks[2], where))
        elif calls[0] > 2:
            remove[0]()

    handle = blocks[0].register_forward_pre_hook(count)
    result = engine.train_step(step, **kwargs)
    handle.remove()
    remove[0]()
    assert FULL in str(result.lacked_memory)
    return result


def _steps(engine: Any, *, full_at: int | None, where: str) -> None:
    """Take four steps of four micro-batches; the one that memory ends in is taken in halves."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    groups = tiny_groups(TinyModel(), lr=1e-3)
    for step in range(4):
        batches = global_batch(step, micro_batches=4)
        own = batches[rank::world]
        kwargs: dict[str, Any] = {
            "task": TASKS[step % 2],
            "global_count": sum(len(b.targets["y"]) for b in batches),
            "learning_rates": learning_rates(groups, step),
        }
        if step == full_at:
            before_it = engine.full_weights()
            if rank == world - 1:
                result = _step_without_room(engine, step, where=where, micro_batches=own, **kwargs)
            else:
                result = engine.train_step(step, micro_batches=own, **kwargs)
                assert result.lacked_memory is None
            assert result.refused == "the loss is nan"
            assert bitwise_equal(before_it, engine.full_weights())
            own = _halves(batches)[rank::world]
        result = engine.train_step(step, micro_batches=own, **kwargs)
        assert (result.refused, result.lacked_memory) == (None, None)


def _stays_in_step() -> None:
    bounds: tuple[tuple[Precision, float], ...] = (("fp32", 1e-6), ("bf16", 2e-3))
    for precision, most in bounds:
        for stage, where in IN_STEP:
            if precision == "bf16" and stage == 0:
                continue  # nothing differs from fp32 there
            ends: list[dict[str, Tensor]] = []
            for full_at in (2, None):
                engine = make_deepspeed(
                    EngineOptions(precision=precision, eps=1e-5), zero_stage=stage
                )
                engine.set_trainable(ALL)
                _steps(engine, full_at=full_at, where=where)
                ends.append(engine.full_weights())
            if dist.get_rank() == 0:
                assert largest_difference(*ends) <= most, (precision, stage, where)


def _ends_in_the_reduction() -> None:
    import deepspeed

    whole = deepspeed.DeepSpeedEngine.allreduce_gradients
    calls: list[int] = []

    def no_room_once(self: Any, *arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            _no_room()
        whole(self, *arguments, **options)

    engine = make_deepspeed(EngineOptions(), zero_stage=0)
    engine.set_trainable(ALL)
    batches = global_batch(0, micro_batches=4)
    with (
        mock.patch.object(deepspeed.DeepSpeedEngine, "allreduce_gradients", no_room_once),
        pytest.raises(torch.OutOfMemoryError, match="fake allocator"),
    ):
        engine.train_step(
            0,
            task=TASKS[0],
            micro_batches=batches[dist.get_rank() :: 2],
            global_count=sum(len(b.targets["y"]) for b in batches),
            learning_rates=learning_rates(tiny_groups(TinyModel(), lr=1e-3), 0),
        )
    assert calls == [1], "the reduction was begun again, which the other ranks do not expect"


def test_memory_that_ends_while_gradients_are_reduced_ends_the_run() -> None:
    run_distributed(_ends_in_the_reduction)


def test_the_ranks_stay_in_step_and_take_it_again_in_halves() -> None:
    run_distributed(_stays_in_step)


def test_the_reference_engine_takes_the_step_again() -> None:
    ends: list[dict[str, Tensor]] = []
    for full_at in (2, None):
        engine = make_reference(EngineOptions(eps=1e-5))
        engine.set_trainable(ALL)
        _steps(engine, full_at=full_at, where="backward")
        ends.append(engine.full_weights())
    assert largest_difference(*ends) <= 1e-6


def _small_device(*, rows: int, where: str, first_step: int = 0) -> None:
    """Give this rank a device that has no room for more than `rows` in its second block."""
    original, forward, layer = DeepSpeedEngine.train_step, LossModule.forward, BertLayer.forward
    now, shape, blocks = [0], [0], [0]

    def train_step(self: DeepSpeedEngine, step: int, **kwargs: Any) -> StepResult:
        now[0] = step
        return original(self, step, **kwargs)

    def watched(self: LossModule, task: str, inputs: Any, *args: Any) -> Any:
        shape[0] = len(inputs["input_ids"]) if torch.is_grad_enabled() else 0
        blocks[0] = 0
        return forward(self, task, inputs, *args)

    def block(self: BertLayer, *args: Any, **kwargs: Any) -> Any:
        blocks[0] += 1
        full = blocks[0] == 2 and shape[0] > rows and now[0] >= first_step
        if full and where == "forward":
            _no_room()
        out = layer(self, *args, **kwargs)
        if full:
            (out if isinstance(out, Tensor) else out[0]).register_hook(_no_room)
        return out

    DeepSpeedEngine.train_step = train_step
    LossModule.forward = watched  # pyright: ignore[reportAttributeAccessIssue]
    BertLayer.forward = block


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recipe without dropout, whose run `oracle` has had memory enough."""
    recipe = write_recipe(
        tmp_path_factory.mktemp("memory"),
        train={"max_duration": "12step", "global_batch_size": 16, "micro_batch_size": 4},
        # Where a gradient is zero but for rounding, Adam makes whole steps of the rest of it.
        optim={"lr": 1e-3, "head_lr": 1e-3, "eps": 1e-5},
        regularization={
            "dropout": {"embeddings": 0.0, "attention": 0.0, "hidden": 0.0, "head": 0.0}
        },
        evaluation={"every": None},
        checkpoint={"every": "4step"},
    )
    assert supervise(recipe, ["name=oracle", UNFROZEN]).code == 0
    return recipe


def _weights(run: Path) -> dict[str, Tensor]:
    from dist_ft.train.checkpoint import CheckpointReader

    reader = CheckpointReader(newest_checkpoint(run))
    found: dict[str, Tensor] = {}
    for kind, name in reader.saved():
        value = reader.read(kind, name, start=0, length=reader.numel(name))
        if kind == "weight" and value is not None:
            found[name] = value
    return found


def test_a_run_goes_on_in_smaller_micro_batches_also_when_it_is_resumed(oracle: Path) -> None:
    launcher = os.getpid()

    def fault(attempt: int, rank: int) -> None:
        del attempt
        if rank == 1:
            _small_device(rows=1, where="forward", first_step=3)
            before(
                DeepSpeedEngine,
                "train_step",
                lambda call: os.kill(launcher, signal.SIGTERM) if call == 8 else None,
            )

    run = oracle.parent / "runs/replanned"
    assert supervise(oracle, ["name=replanned", UNFROZEN], fault=fault).code == 75

    def still_small(attempt: int, rank: int) -> None:
        del attempt
        if rank == 1:
            _small_device(rows=1, where="backward")

    resumed = supervise(oracle, ["name=replanned", UNFROZEN], fault=still_small, resume=True)
    assert (resumed.code, resumed.said) == (0, [])
    found = [e for e in events(run) if e["event"] == "out_of_memory"]
    # Two rows were still too many; after that, none more, nor when it went on.
    assert [(e["step"], e["ranks"], e["micro_batch_size"]) for e in found] == [
        (3, [1], 2),
        (3, [1], 1),
    ]
    assert not [e for e in events(run) if e["event"] in ("bad_numbers", "failure")]
    steps = [e["step"] for e in events(run) if e["event"] == "step"]
    assert steps == list(range(1, 13))
    ends = _weights(run), _weights(oracle.parent / "runs/oracle")
    assert largest_difference(*ends) <= 1e-5


@pytest.mark.parametrize(
    ("objective", "where"),
    [
        ("adversarial: {type: freelb}", "forward"),
        ("mixup: {blocks: [1]}, tasks: [text]", "backward"),
    ],
)
def test_what_an_objective_remembers_of_all_rows_is_not_one_rows(
    oracle: Path, objective: str, where: str
) -> None:
    def fault(attempt: int, rank: int) -> None:
        del attempt
        if rank == 1:
            _small_device(rows=2, where=where, first_step=3)

    # In stage 1 the ranks stay in step wherever memory ends.
    name = objective.partition(":")[0]
    settings = [f"name={name}", UNFROZEN, f"regularization={{{objective}}}", "engine.zero_stage=1"]
    done = supervise(oracle, [*settings, "train.max_duration=6step"], fault=fault)
    assert (done.code, done.said) == (0, [])
    found = [e for e in events(oracle.parent / "runs" / name) if e["event"] == "out_of_memory"]
    assert {(e["step"], *e["ranks"]) for e in found} == {(3, 1)}


SIZES = ("2 rows instead of 4", "1 row instead of 2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "where", "rows"), [(2, "backward", 1), (3, "forward", 1), (3, "backward", 1)]
)
def test_where_others_wait_already_the_ranks_start_again(
    oracle: Path, stage: int, where: str, rows: int
) -> None:
    def fault(attempt: int, rank: int) -> None:
        del attempt
        if rank == 1:
            _small_device(rows=rows, where=where, first_step=5)

    name = f"again{stage}{where}"
    outcome = supervise(
        oracle,
        [f"name={name}", UNFROZEN, f"engine.zero_stage={stage}"],
        fault=fault,
        max_restarts=0,  # a smaller plan is no restart
    )
    assert outcome.code == 0, outcome.said
    # Twice in the same step if need be, which would be a bug if nothing had changed in between.
    assert len(outcome.said) == 2
    for said, sizes in zip(outcome.said, SIZES, strict=True):
        assert said.startswith("rank 1 ended with exit code 76 (rank 1 ran out of memory in step 5")
        assert sizes in said
    run = oracle.parent / "runs" / name
    ends = _weights(run), _weights(oracle.parent / "runs/oracle")
    assert largest_difference(*ends) <= 1e-5


def test_a_row_that_does_not_fit_is_an_error(
    oracle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fault(attempt: int, rank: int) -> None:
        del attempt
        if rank == 1:
            _small_device(rows=0, where="forward")

    outcome = supervise(
        oracle, ["name=hopeless", UNFROZEN, "train.micro_batch_size=1"], fault=fault, max_restarts=0
    )
    assert outcome.code == 1
    assert "has no memory for a single row" in capfd.readouterr().err
    assert "has no memory for a single row" in outcome.said[0]


def test_an_evaluation_without_room_scores_fewer_rows_at_once_and_leaves_training_alone(
    tmp_path: Path,
) -> None:
    console, recorder = Console(main=False, every=1), Recorder(None)
    task: Any = SimpleNamespace(name="tags", new_metrics=lambda: None)
    nothing: Any = None
    run: Any = SimpleNamespace(
        engine=SimpleNamespace(averaged=contextlib.nullcontext, eval_forward=_no_room),
        progress=Progress(step=4), beat=lambda _: None, stop_signal=lambda: 0, callbacks=[],
    )  # fmt: skip
    said: list[str] = []
    recipe = load_recipe(write_recipe(tmp_path / "recipe"), overrides=["train.micro_batch_size=4"])
    for _ in range(4):  # the launcher starts the ranks again
        memory = FitMemory(tmp_path, Portion(4), 30, recorder, console)
        rows = memory.resume(recipe).evaluation.micro_batch_size or 8
        assert memory.now.rows == 4
        data = [EvalData(task, "validation", nothing, nothing, rows)]
        evaluate = Evaluate(recorder, console, World(0, 0, 1), data, every=None)
        with (
            mock.patch.object(evaluation, "eval_batches", return_value=[SimpleNamespace()]),
            pytest.raises(RuntimeError) as error,
            memory.watching(run),
        ):
            evaluate.evaluate(run)
        said.append(str(error.value))
        assert isinstance(error.value, ReplannedError) == (rows > 1)
    assert "of 4 rows, 4 in an evaluation instead of 4 rows:" in said[0]
    assert "of 4 rows, 1 in an evaluation instead of 4 rows, 2 in an evaluation:" in said[2]
    assert "no memory to score a single row (evaluation of task tags" in said[3]


def test_a_portion_is_halved_down_to_a_row_and_a_budget_to_the_longest_row() -> None:
    sizes = [Portion(12, 1000)]
    while (portion := sizes[-1].smaller(longest=300)) is not None:
        sizes.append(portion)
    assert [(p.rows, p.tokens) for p in sizes] == [
        (12, 1000), (6, 500), (3, 300), (1, 300),
    ]  # fmt: skip
    assert Portion(1).smaller(longest=9) is None


def _memory_cgroup() -> Path | None:
    """Return the folder of this process's memory cgroup if it may be divided, version 1 or 2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        root = Path("/sys/fs/cgroup", "memory" if controllers == "memory" else "")
        folder = root / path.lstrip("/")
        divisible = controllers == "memory" or (
            controllers == "" and "memory" in _text(folder / "cgroup.subtree_control")
        )
        if divisible and os.access(folder, os.W_OK):
            return folder
    return None


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


LIMIT = 2**30


@pytest.mark.skipif(_memory_cgroup() is None, reason="no memory cgroup may be divided here")
def test_a_rank_killed_for_want_of_host_memory_is_told_so(oracle: Path) -> None:
    above = _memory_cgroup()
    assert above is not None
    group = above / f"dist_ft-test-{os.getpid()}"
    group.mkdir()
    said = oracle.parent / "said"

    def eat(call: int) -> None:
        if call == 3:
            _ = b"x" * (2 * LIMIT)

    def fault(attempt: int, rank: int) -> None:
        del attempt
        if rank == 1:
            before(DeepSpeedEngine, "train_step", eat)

    launcher = os.fork()
    if launcher == 0:
        limit = group / "memory.limit_in_bytes"
        (limit if limit.exists() else group / "memory.max").write_text(str(LIMIT))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        outcome = supervise(oracle, ["name=host", UNFROZEN], fault=fault, max_restarts=0)
        said.write_text("\n".join(outcome.said))
        os._exit(outcome.code)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1]) == 1
    finally:
        group.rmdir()
    assert said.read_text().startswith(
        "rank 1 was killed by SIGKILL (by the kernel: host memory ran out (the limit here is 1.0 "
        "GiB); lower train.micro_batch_size"
    )


@pytest.mark.parametrize(
    ("version", "files"),
    [
        ("0::/job", {"job/memory.events": "low 0\noom_kill 3\n", "job/memory.max": "1073741824"}),
        (
            "4:memory:/job",
            {
                "memory/job/memory.oom_control": "under_oom 0\noom_kill 3\n",
                "memory/job/memory.limit_in_bytes": "1073741824",
            },
        ),
    ],
)
def test_the_kernels_count_is_read_in_both_versions(
    tmp_path: Path, version: str, files: dict[str, str]
) -> None:
    proc = tmp_path / "cgroup"
    proc.write_text(f"9:cpu:/\n{version}\n")
    assert (oom_kills(proc, root=tmp_path), memory_limit(proc, root=tmp_path)) == (None, "")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert oom_kills(proc, root=tmp_path) == 3
    assert memory_limit(proc, root=tmp_path) == " (the limit here is 1.0 GiB)"
