"""Checkpoints: what comes back is what was saved, on any ZeRO stage and world size."""

from __future__ import annotations

import errno
import json
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from dist_ft.engine.base import EngineOptions, EngineState, StateSlice
from dist_ft.train.checkpoint import (
    CheckpointError,
    CheckpointReader,
    find_checkpoint,
    put_back,
    verify_checkpoint,
)
from dist_ft.train.retention import Retention
from dist_ft.train.saving import CheckpointWriter, save_checkpoint
from tests.helpers.manifests import write_as_another_version
from tests.helpers.phases import (
    ALL,
    bitwise_equal,
    largest_difference,
    make_deepspeed,
    make_reference,
    run,
)
from tests.helpers.run_distributed import run_distributed

HEADS = ("head.a", "head.b")
# Saved after step 14, inside a phase in which a group that trained before is frozen.
SCHEDULE = {
    0: ("block.3", *HEADS),
    4: ALL,
    9: ("block.1", "block.2", *HEADS),
    17: ("block.0", "block.3", "head.a"),
    21: ALL,
}
SAVED_AT, STEPS = 14, 28
MICRO_BATCHES = 4


def _share() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def _engine(stage: int, precision: Any, switch: Any) -> Any:
    accumulation = MICRO_BATCHES // dist.get_world_size()
    options = EngineOptions(precision=precision)
    return make_deepspeed(
        options, zero_stage=stage, switch=switch, accumulation=accumulation, dropout=0.1
    )


def _train(engine: Any, steps: range, schedule: Any = SCHEDULE) -> None:
    run(engine, schedule, steps=steps, micro_batches=MICRO_BATCHES, share=_share())


def _save(root: Path, engine: Any, step: int, keep_last: int = 2) -> Path:
    retention = Retention(keep_last=keep_last)
    return save_checkpoint(
        root, step=step, state=engine.state(), trainer={}, retention=retention
    ).path


def _resume(root: Path, stage: int, precision: Any, switch: Any) -> Any:
    path, passed_over = find_checkpoint(root)
    assert path is not None
    assert not passed_over
    reader = CheckpointReader(path)
    engine = _engine(stage, precision, switch)
    engine.set_trainable(reader.trainer["trainable"])
    engine.load_state(reader)
    return engine


def _interrupted(root: Path, stage: int, precision: Any, switch: Any) -> None:
    straight = _engine(stage, precision, switch)
    _train(straight, range(STEPS))
    expected = straight.full_weights()
    first = _engine(stage, precision, switch)
    _train(first, range(SAVED_AT))
    _save(root, first, SAVED_AT)
    second = _resume(root, stage, precision, switch)
    _train(second, range(SAVED_AT, STEPS))
    weights = second.full_weights()
    if dist.get_rank() == 0:
        assert bitwise_equal(weights, expected)


@pytest.mark.parametrize("switch", ["rebuild", "in_place"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_interrupted_equals_uninterrupted_bit_for_bit(
    stage: int, precision: str, switch: str, tmp_path: Path
) -> None:
    run_distributed(_interrupted, tmp_path, stage, precision, switch)


def _first_half(root: Path, stage: int) -> None:
    engine = _engine(stage, "fp32", "rebuild")
    _train(engine, range(SAVED_AT))
    _save(root, engine, SAVED_AT)


def _second_half(root: Path, stage: int, expected: Any) -> None:
    engine = _resume(root, stage, "fp32", "rebuild")
    _train(engine, range(SAVED_AT, STEPS))
    weights = engine.full_weights()
    if dist.get_rank() == 0:
        # The world size changes the order of sums, nothing else.
        assert largest_difference(weights, expected) <= 1e-5


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [((1, 2), (3, 2)), ((3, 2), (2, 4)), ((2, 4), (0, 1)), ((0, 2), (1, 1)), ((2, 1), (3, 4))],
    ids=lambda v: f"zero{v[0]}x{v[1]}",
)
def test_any_stage_and_world_size_goes_on(
    saved: tuple[int, int], loaded: tuple[int, int], tmp_path: Path
) -> None:
    reference = make_reference(EngineOptions(), dropout=0.1)
    run(reference, SCHEDULE, steps=range(STEPS), micro_batches=MICRO_BATCHES)
    run_distributed(_first_half, tmp_path, saved[0], world_size=saved[1])
    run_distributed(
        _second_half, tmp_path, loaded[0], reference.full_weights(), world_size=loaded[1]
    )


def _other_mask(root: Path, groups: tuple[str, ...], expected: Any) -> None:
    engine = _resume(root, 2, "fp32", "rebuild")
    engine.set_trainable(groups)
    _train(engine, range(SAVED_AT, 20), {})
    weights = engine.full_weights()
    if dist.get_rank() == 0:
        assert largest_difference(weights, expected) <= 1e-5


@pytest.mark.parametrize("groups", [ALL, HEADS], ids=["larger", "smaller"])
def test_a_checkpoint_loads_under_another_mask(groups: tuple[str, ...], tmp_path: Path) -> None:
    reference = make_reference(EngineOptions(), dropout=0.1)
    run(reference, SCHEDULE, steps=range(SAVED_AT), micro_batches=MICRO_BATCHES)
    run(reference, {SAVED_AT: groups}, steps=range(SAVED_AT, 20), micro_batches=MICRO_BATCHES)
    run_distributed(_first_half, tmp_path, 2)
    run_distributed(_other_mask, tmp_path, groups, reference.full_weights())


def _damaged(root: Path, damage: str) -> None:
    engine = _engine(2, "fp32", "rebuild")
    for step in (3, 6):
        _train(engine, range(step - 3, step), {0: ALL})
        newest = _save(root, engine, step)
    if dist.get_rank() == 0:
        victim = newest / "rank-00001.safetensors"
        data = bytearray(victim.read_bytes())
        if damage == "flipped":
            data[len(data) // 2] ^= 1
            victim.write_bytes(data)
        elif damage == "truncated":
            victim.write_bytes(data[:-10])
        elif damage == "missing":
            victim.unlink()
        else:
            (newest / "manifest.json").unlink()
    dist.barrier()
    path, passed_over = find_checkpoint(root)
    assert path is not None
    assert path.name == "step-00000003"
    assert len(passed_over) == 1
    assert passed_over[0].startswith("step-00000006: ")
    dist.barrier()
    if dist.get_rank() == 0:
        write_as_another_version(path)
    dist.barrier()
    with pytest.raises(CheckpointError, match="has format version 2, this version of dist_ft"):
        find_checkpoint(root)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over_by_all_ranks(damage: str, tmp_path: Path) -> None:
    run_distributed(_damaged, tmp_path, damage)


def _unwritable(root: Path) -> None:
    engine = _engine(1, "fp32", "rebuild")
    _train(engine, range(2), {0: ALL})
    good = _save(root, engine, 2)
    if dist.get_rank() == 1:
        # A file where the rank's own file must go: the write fails on this rank only.
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with pytest.raises(CheckpointError, match="rank 1"):
        _save(root, engine, 3)
    dist.barrier()
    path, _ = find_checkpoint(root)
    assert path == good
    assert [p.name for p in sorted(root.iterdir())] == [good.name]


def test_a_rank_that_cannot_write_loses_nothing(tmp_path: Path) -> None:
    run_distributed(_unwritable, tmp_path)


def _retention(root: Path) -> None:
    engine = _engine(0, "fp32", "rebuild")
    for step in range(1, 6):
        _train(engine, range(step - 1, step), {0: ALL})
        _save(root, engine, step, keep_last=2)
    if dist.get_rank() == 0:
        assert sorted(os.listdir(root)) == ["step-00000004", "step-00000005"]  # noqa: PTH208
    dist.barrier()


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run_distributed(_retention, tmp_path)


def _after_falling_back(root: Path) -> None:
    engine = _engine(2, "fp32", "rebuild")
    _train(engine, range(1), {0: ALL})
    _save(root, engine, 1)
    _save(root, engine, 5)
    if dist.get_rank() == 0:  # the run goes back behind a damaged checkpoint and saves again
        (root / "step-00000005" / "rank-00000.safetensors").write_bytes(b"")
    dist.barrier()
    _save(root, engine, 2, keep_last=1)
    path, _ = find_checkpoint(root)
    assert path is not None
    assert path.name == "step-00000002"


def test_retention_counts_only_the_run_as_it_goes_on(tmp_path: Path) -> None:
    run_distributed(_after_falling_back, tmp_path)


def _cut_between_renames(root: Path) -> None:
    engine = _engine(0, "fp32", "rebuild")
    _train(engine, range(1), {0: ALL})
    saved = _save(root, engine, 1)
    # A save of the same step was killed after the old one was renamed, before the new one was.
    saved.rename(root / ".old-step-00000001")
    put_back(root)
    path, passed_over = find_checkpoint(root)
    assert path == saved
    assert not passed_over


def test_a_replacement_that_was_cut_short_loses_nothing(tmp_path: Path) -> None:
    run_distributed(_cut_between_renames, tmp_path, world_size=1)


def test_a_replacement_that_fails_leaves_the_older_one_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = EngineState([StateSlice("p", 0, {"weight": torch.ones(3)})], {}, ())
    saved = save_checkpoint(tmp_path, step=1, state=state, trainer={}).path
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if self.name.startswith(".tmp-"):
            raise OSError(errno.ENOSPC, "no room for a name")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(CheckpointError, match="no room for a name"):
        save_checkpoint(tmp_path, step=1, state=state, trainer={})
    assert find_checkpoint(tmp_path) == (saved, [])
    assert list(tmp_path.iterdir()) == [saved]


def test_an_old_checkpoint_that_can_not_be_removed_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = EngineState([StateSlice("p", 0, {"weight": torch.ones(3)})], {}, ())

    unlink = Path.unlink

    def busy(self: Path, **options: Any) -> None:
        if self.name == "manifest.json":
            raise OSError(errno.EBUSY, f"{self} is in use")
        unlink(self, **options)

    for step in (1, 2):
        save_checkpoint(tmp_path, step=step, state=state, trainer={})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", busy)
        save_checkpoint(tmp_path, step=3, state=state, trainer={})
    save_checkpoint(tmp_path, step=4, state=state, trainer={})
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["3", "4"]


def _changes_of(text: bytes) -> Iterator[bytes]:
    for place in range(len(text)):
        yield text[:place] + bytes([text[place] ^ 1 << place % 8]) + text[place + 1 :]
        yield text[:place]


def test_any_change_of_a_manifest_is_found_and_it_leads_nowhere_else(tmp_path: Path) -> None:
    state = EngineState([StateSlice("p", 0, {"weight": torch.ones(3)})], {}, ())
    save_checkpoint(tmp_path, step=1, state=state, trainer={})
    folder, damage = find_checkpoint(tmp_path)
    assert folder is not None
    assert damage == []
    manifest = folder / "manifest.json"
    whole = manifest.read_bytes()
    said = json.loads(whole)
    for changed in _changes_of(whole):
        manifest.write_bytes(changed)
        try:
            same = {**json.loads(changed), "xxh3": said["xxh3"]} == said
        except ValueError:
            same = False
        # White space may differ, and a manifest without its digest is an old one.
        assert same or verify_checkpoint(folder) is not None, changed
    # Whoever can write the digest anew still reaches no file outside.
    (tmp_path / "outside.safetensors").write_bytes((folder / said["files"][0]["file"]).read_bytes())
    said["files"][0]["file"] = "../outside.safetensors"
    del said["xxh3"]
    manifest.write_text(json.dumps(said))
    assert "elsewhere" in str(verify_checkpoint(folder))


class _Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_a_checkpoint_is_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "was unpickled"
    state = EngineState([StateSlice("p", 0, {"weight": torch.ones(3)})], {}, ())
    folder = save_checkpoint(tmp_path, step=1, state=state, trainer={}).path
    torch.save(_Evil(mark), tmp_path / "evil")
    torch.load(tmp_path / "evil", weights_only=False)
    assert mark.exists()  # as it would be
    mark.unlink()
    for evil in (pickle.dumps(_Evil(mark)), (tmp_path / "evil").read_bytes()):
        for file in folder.iterdir():
            before = file.read_bytes()
            file.write_bytes(evil)
            assert verify_checkpoint(folder) is not None
            with pytest.raises((ValueError, SafetensorError)):
                CheckpointReader(folder)  # as if it had a manifest to go with it
            assert not mark.exists()
            file.write_bytes(before)
    assert verify_checkpoint(folder) is None


def test_others_may_read_a_checkpoint_if_the_umask_lets_them(tmp_path: Path) -> None:
    state = EngineState([StateSlice("p", 0, {"weight": torch.ones(3)})], {}, ())
    before = os.umask(0o027)
    try:
        folder = save_checkpoint(tmp_path, step=1, state=state, trainer={}).path
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o640}
    assert len(list(folder.iterdir())) == 3


def _copy(engine: Any) -> dict[tuple[str, int, str], torch.Tensor]:
    return {
        (s.parameter, s.start, kind): value.clone()
        for s in engine.state().slices
        for kind, value in s.values.items()
    }


def _asks_before_a_change() -> None:
    for stage in (0, 2, 3):
        engine = _engine(stage, "bf16", "rebuild")
        _train(engine, range(2), {0: ALL})
        kept, same = _copy(engine), list[bool]()

        def look(engine: Any = engine, kept: Any = kept, same: Any = same) -> None:
            same.append(all(torch.equal(kept[k], v) for k, v in _copy(engine).items()))

        engine.before_change = look
        # Forward and backward passes are behind it then; the update is not.
        _train(engine, range(2, 3), {})
        assert same == [True]
        engine.set_trainable(ALL[:3])
        assert same == [True, False]


def test_an_engine_asks_before_its_state_changes() -> None:
    run_distributed(_asks_before_a_change)


def test_a_save_keeps_what_was_there_when_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_from = CheckpointWriter._copy_from

    def slowly(self: CheckpointWriter, state: EngineState) -> None:
        time.sleep(0.2)
        copy_from(self, state)

    monkeypatch.setattr(CheckpointWriter, "_copy_from", slowly)
    weight = torch.ones(3)
    state = EngineState([StateSlice("p", 0, {"weight": weight})], {}, ())
    writer = CheckpointWriter(tmp_path, retention=Retention())
    writer.begin(step=1, state=state, trainer={})
    writer.copied()
    weight.zero_()
    saved = writer.wait()
    assert saved is not None
    assert saved.stall_s > 0.1  # what an update waits for it counts
    read = CheckpointReader(saved.path).read("weight", "p", start=0, length=3)
    assert read is not None
    assert read.tolist() == [1.0, 1.0, 1.0]
