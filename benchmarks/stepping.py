"""A run whose phases and steps a benchmark drives itself, and a core's measured GEMM peak."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.training.own_run import open_run
from dist_ft.data.loader import StepBatch
from dist_ft.engine import exchange
from dist_ft.engine.base import DTYPES, PhaseReport

T = TypeVar("T")
_COLLECTIVES = (
    "all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter",
    "reduce_scatter_tensor", "barrier",
)  # fmt: skip
# Square matrices; on a CPU with AMX the best of 512 to 4,096 is at 1,024 or 2,048.
_GEMM_SIZES = (1024, 2048)


class Stepper:
    """Steps of a recipe's run on this rank; the process group must be up."""

    def __init__(self, recipe: Path, *, folder: Path, steps: int) -> None:
        """Make the run and fetch its first batches; what trains is set next."""
        self.run = open_run(recipe, folder=folder)
        self.batches = [self.run.loader.batch(step) for step in range(steps)]
        self.step = 0
        self._trainable: tuple[str, ...] = ()

    def train(self) -> PhaseReport:
        """Let train what the recipe's schedule begins with."""
        self._trainable = tuple(self.run.policy.phase_at(0).trainable)
        return self.run.engine.set_trainable(self._trainable)

    def one(self, batch: StepBatch) -> None:
        """Run an optimizer step."""
        self.run.engine.train_step(
            self.step,
            task=batch.task,
            micro_batches=batch.micro_batches,
            global_count=batch.global_count,
            learning_rates=dict.fromkeys(self._trainable, 1e-5),
        )
        self.step += 1

    def seconds(self, batches: Sequence[StepBatch] | None = None) -> list[float]:
        """Return the wall time of a step on each batch (all of ours), ranks in step."""
        return step_seconds(self.one, self.batches if batches is None else batches)

    def close(self) -> None:
        """Free weights, optimizer state and whatever was cached."""
        self.run.discard()
        self.run.engine.close()


def step_seconds(one: Callable[[T], None], batches: Iterable[T]) -> list[float]:
    """Return the wall time of a step on each batch, ranks in step."""
    found: list[float] = []
    for batch in batches:
        dist.barrier()
        began = time.perf_counter()
        one(batch)
        dist.barrier()
        found.append(time.perf_counter() - began)
    return found


def gemm_peak(precision: str, *, repeats: int = 5) -> float:
    """Return the best floating-point rate of a square GEMM, FLOP/s of this rank's one thread.

    Every rank measures at the same time, as every rank computes at the same time in a step.
    """
    best = 0.0
    for size in _GEMM_SIZES:
        left, right = (torch.randn(size, size).to(DTYPES[precision]) for _ in range(2))
        torch.mm(left, right)
        dist.barrier()
        for _ in range(repeats):
            began = time.perf_counter()
            torch.mm(left, right)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


@contextmanager
def around_collectives(make: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Enter a context of its own around each of torch's collectives inside the context.

    Of our own exchanges both halves count: their begin, and the wait for their end.
    """

    def inside(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            with make():
                return function(*arguments, **options)

        return call

    swap = exchange.swap

    def swapped(*arguments: Any, **options: Any) -> Callable[[], None]:
        return inside(inside(swap)(*arguments, **options))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(exchange, "swap", swapped))
        for name in _COLLECTIVES:
            stack.enter_context(mock.patch.object(dist, name, inside(getattr(dist, name))))
        yield


@dataclass
class Stopwatch:
    """Adds up the seconds spent inside of it."""

    seconds: float = 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Count the seconds of the context."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began
