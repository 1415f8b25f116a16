"""Saves beside the training: copy and write in a thread, commit when every rank has written.

Weights and moments stand still from one update to the next, so they are copied into host memory
while the next step runs forward and backward (CheckFreq: Mohan et al. 2021, section 4.1); training
waits for what is not copied when the step comes to its update. The files are written and hashed by
the same thread, on every rank; at the first step at which all are done, rank 0 commits, again in
its thread. The copy is kept for the next save, so that it costs no fresh pages: one more share of
the state in host memory.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_ft import dist
from dist_ft.engine.base import EngineState
from dist_ft.train.checkpoint import (
    CheckpointError,
    commit,
    remove_old,
    write_rank_file,
)
from dist_ft.train.checkpoint_names import checkpoint_name
from dist_ft.train.retention import Retention

_FREE_SPACE_MARGIN = 64 * 2**20


@dataclass(frozen=True)
class Saved:
    """How a save went.

    Attributes:
        step: Optimizer steps done.
        path: The checkpoint; it exists only if there was no problem.
        bytes: Its size over all ranks.
        save_s: Seconds from the call until the checkpoint existed.
        stall_s: Those of them that training waited, on rank 0.
        problem: Why there is no checkpoint, or None.
    """

    step: int
    path: Path
    bytes: int = 0
    save_s: float = 0.0
    stall_s: float = 0.0
    problem: str | None = None

    def check(self) -> None:
        """Check that the checkpoint exists.

        Raises:
            CheckpointError: If it does not; earlier checkpoints are untouched.
        """
        if self.problem is not None:
            raise CheckpointError(
                f"checkpoint of step {self.step} was not written ({self.problem}): free space in "
                f"{self.path.parent} or point output_dir elsewhere; earlier checkpoints are intact"
            )


class CheckpointWriter:
    """Writes one checkpoint at a time; every rank calls the same methods in the same order."""

    def __init__(self, root: Path, *, retention: Retention) -> None:
        """Write into `root`, the run's ``checkpoints`` folder, shared by all ranks."""
        self._root = root
        self._retention = retention
        # A thread begins on the first GPU, where its streams would be made and waited for.
        device = torch.cuda.current_device() if _on_gpu() else None
        self._thread = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="dist_ft-save",
            initializer=functools.partial(_use_gpu, device),
        )
        self._copy: dict[str, Tensor] = {}
        self._room: Future[dict[str, Tensor]] | None = None
        self._trainer: Mapping[str, Any] = {}
        self._began = 0.0
        self._saving: Saved | None = None
        self._copying: Future[None] | None = None
        self._write: Future[tuple[dict[str, Any], str | None]] | None = None
        self._commit: Future[Saved] | None = None

    def close(self) -> None:
        """Wait until this rank writes no more; for the end of a run that failed, too."""
        self._thread.shutdown()

    def prepare(self, state: EngineState) -> None:
        """Make room for the copy of a state like this, beside the training.

        Fresh pages cost several times what copying into them does.
        """
        shapes = {name: (value.shape, value.dtype) for name, value in _named(state)}
        self._room = self._thread.submit(_room_for, shapes, pinned=_on_gpu())

    @property
    def writing(self) -> bool:
        """Whether ranks are writing; the same on every rank."""
        return self._write is not None

    def begin(self, *, step: int, state: EngineState, trainer: Mapping[str, Any]) -> Saved | None:
        """Start to copy the state and to write; return how the save before went, as `wait` does.

        Args:
            step: Optimizer steps done.
            state: This rank's share; it may change once `copied` has returned.
            trainer: What else the run needs to go on, as JSON; the same on every rank.
        """
        before = self.wait()
        self._began = time.monotonic()
        self._saving = Saved(step, self._root / checkpoint_name(step))
        self._trainer = {
            **trainer,
            "steps": state.steps,
            "trainable": list(state.trainable),
            "loss_scale": state.loss_scale,
            "averaged": state.averaged,
        }
        needed = _bytes_of(state)
        (total,) = dist.all_reduce_sum([float(needed)])
        self._saving = replace(self._saving, bytes=int(total))
        problem = self._lacks_space(int(total))
        if problem is None:
            ready = torch.cuda.Event() if _on_gpu() else None
            if ready is not None:
                ready.record()
            self._copying = self._thread.submit(self._take_copy, state, ready=ready)
            self._write = self._thread.submit(self._write_copy, self._temporary)
        else:
            self._write = Future()
            self._write.set_result(({}, problem))
        self._stalled_since(self._began)
        return before

    @property
    def _temporary(self) -> Path:
        assert self._saving is not None
        return self._root / f".tmp-{self._saving.path.name}"

    def _lacks_space(self, total: int) -> str | None:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._root).free
        except OSError as error:  # a disk that is gone for a while is no reason to stop
            return str(error)
        if free < total + _FREE_SPACE_MARGIN:
            return f"{total} bytes are needed and {free} are free"
        return None

    def copied(self) -> None:
        """Wait until nothing of the state is still to be copied; called before it changes."""
        if self._copying is not None:
            began = time.monotonic()
            self._copying.result()
            self._copying = None
            self._stalled_since(began)

    def _take_copy(self, state: EngineState, *, ready: torch.cuda.Event | None) -> None:
        """Copy this rank's share into host memory that is used again and again."""
        if self._room is not None:
            self._copy = self._room.result()
            self._room = None
        if ready is None:
            self._copy_from(state)
            return
        # Beside what the training computes, but behind the update that made the state.
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_event(ready)
            self._copy_from(state)
            torch.cuda.current_stream().synchronize()

    def _copy_from(self, state: EngineState) -> None:
        copy: dict[str, Tensor] = {}
        for name, value in _named(state):
            kept = self._copy.get(name)
            if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
                kept = torch.empty(value.shape, dtype=value.dtype)
            copy[name] = kept.copy_(value.detach(), non_blocking=True)
        self._copy = copy

    def _write_copy(self, temporary: Path) -> tuple[dict[str, Any], str | None]:
        return write_rank_file(temporary, rank=dist.rank(), tensors=self._copy)

    def poll(self) -> Saved | None:
        """Commit if all ranks have written; return how the save went, once it is over.

        Every rank hears of it after the same step: what they keep follows from what is saved.
        """
        if self._saving is None:
            return None
        began = time.monotonic()
        if self._write is not None:
            (busy,) = dist.all_reduce_max([int(not self._write.done())])
            if not busy:
                self._start_commit()
        else:
            done = self._commit is not None and self._commit.done()
            (is_over,) = dist.all_reduce_max([int(done)])
            if is_over:
                return self._hear()
        self._stalled_since(began)
        return None

    def wait(self) -> Saved | None:
        """Wait until nothing is being saved; return on every rank how the last save went.

        None if that is known already, or nothing was saved.
        """
        if self._saving is None:
            return None
        self.copied()
        began = time.monotonic()
        if self._write is not None:
            self._start_commit()
        saved = self._hear()
        return replace(saved, stall_s=saved.stall_s + time.monotonic() - began)

    def _start_commit(self) -> None:
        """Bring the ranks' entries together and let rank 0 commit them in its thread."""
        assert self._write is not None
        assert self._saving is not None
        gathered = dist.all_gather_object(self._write.result())
        self._write = None
        if dist.rank() == 0:
            problems = [f"rank {rank}: {p}" for rank, (_, p) in enumerate(gathered) if p]
            files = [entry for entry, _ in gathered]
            self._commit = self._thread.submit(
                self._finish, self._temporary, files=files, problem="; ".join(problems) or None
            )

    def _finish(
        self, temporary: Path, *, files: list[dict[str, Any]], problem: str | None
    ) -> Saved:
        assert self._saving is not None
        saved = self._saving
        if problem is None:
            problem = commit(
                temporary, saved.path, step=saved.step, trainer=self._trainer, files=files
            )
        if problem is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # the checkpoint exists; the next save tries again
                remove_old(self._root, step=saved.step, retention=self._retention)
        size = sum(entry.get("bytes", 0) for entry in files)
        return replace(saved, bytes=size, save_s=time.monotonic() - self._began, problem=problem)

    def _hear(self) -> Saved:
        """Return on every rank how the save went, which only rank 0 knows."""
        saved: Saved = dist.broadcast_object(self._over() if dist.rank() == 0 else None)
        self._saving = None
        return saved

    def _over(self) -> Saved:
        assert self._commit is not None
        assert self._saving is not None
        saved = replace(self._commit.result(), stall_s=self._saving.stall_s)
        self._commit = None
        return saved

    def _stalled_since(self, began: float) -> None:
        assert self._saving is not None
        stall = self._saving.stall_s + time.monotonic() - began
        self._saving = replace(self._saving, stall_s=stall)


def _use_gpu(device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)


def _on_gpu() -> bool:
    return torch.cuda.is_available()


def _named(state: EngineState) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a rank's share under the names that they have in its file."""
    for piece in state.slices:
        for kind, value in piece.values.items():
            yield f"{kind}|{piece.parameter}|{piece.start}", value


def _room_for(
    shapes: Mapping[str, tuple[torch.Size, torch.dtype]], *, pinned: bool
) -> dict[str, Tensor]:
    return {
        name: torch.zeros(shape, dtype=dtype, pin_memory=pinned)
        for name, (shape, dtype) in shapes.items()
    }


def _bytes_of(state: EngineState) -> int:
    return sum(value.numel() * value.element_size() for _, value in _named(state))


def save_checkpoint(
    root: Path,
    *,
    step: int,
    state: EngineState,
    trainer: Mapping[str, Any],
    retention: Retention | None = None,
) -> Saved:
    """Write a checkpoint on all ranks and wait until it exists; return how that went.

    Raises:
        CheckpointError: If any rank could not write; the earlier checkpoints are untouched.
    """
    writer = CheckpointWriter(root, retention=retention or Retention())
    writer.begin(step=step, state=state, trainer=trainer)
    saved = writer.wait()
    assert saved is not None
    saved.check()
    return saved
