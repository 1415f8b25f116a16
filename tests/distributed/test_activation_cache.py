"""The cached frozen prefix changes no bit of a run, whatever happens to the run or to the cache."""

import errno
import json
import os
import platform
import resource
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dist_ft.engine.cache_probe import CacheDecision, CacheProbe
from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
from dist_ft.freezing.activation_cache import ActivationCache, CachedTask
from dist_ft.freezing.row_store import RowKeys
from dist_ft.recipe import load_recipe
from dist_ft.train import build
from tests.faults.test_disk_full import limit_files
from tests.helpers.run_distributed import run_distributed
from tests.helpers.supervised import before, supervise
from tests.helpers.tiny_run import state_hash, terminate_at, train, train_in_turn, write_recipe

UNCACHED = ["cache.policy=off", "freezing.prefix_dropout=false"]


def _recipe(folder: Path) -> Path:
    return write_recipe(
        folder,
        train={"max_duration": "40step"},
        checkpoint={"every": None},
        evaluation={"every": None},
    )


def _events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


CASES = {"0": "fp32", "2": "bf16", "3": "fp32"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of runs with and without the cache, at several stages."""
    folder = tmp_path_factory.mktemp("cache")
    wanted: list[list[str]] = []
    for stage, precision in CASES.items():
        engine = [f"engine.zero_stage={stage}", f"engine.precision={precision}"]
        wanted.append([f"name=uncached-{stage}", *engine, *UNCACHED])
        wanted.append([f"name=cached-{stage}", *engine, "cache.policy=on"])
    joined = ["mixture.tasks_per_step=2", "train.max_duration=24step", "engine.zero_stage=3"]
    wanted.append(["name=uncached-joined", *joined, *UNCACHED])
    wanted.append(["name=cached-joined", *joined, "cache.policy=on"])
    small = "cache.budget_gb=6e-5"
    wanted.append(["name=small", "engine.zero_stage=0", "cache.policy=on", small])
    train_in_turn(_recipe(folder), wanted)
    return folder / "runs"


@pytest.mark.parametrize("stage", CASES)
def test_cached_equals_uncached_bit_for_bit(stage: str, runs: Path) -> None:
    cached, uncached = runs / f"cached-{stage}", runs / f"uncached-{stage}"
    assert state_hash(cached) == state_hash(uncached)
    phases = _events(cached, "phase")
    assert [p["cached_blocks"] for p in phases] == [4, 2, 0]
    assert phases[0]["cache_bytes"] > phases[1]["cache_bytes"] > 0
    assert all(p["cached_blocks"] == 0 for p in _events(uncached, "phase"))
    hits = {e["step"]: e.get("prefix_hit_share") for e in _events(cached, "step")}
    assert hits[1] == 0.0  # the first step has to compute
    assert hits[26] == 1.0  # an epoch and a phase later nothing has
    assert hits[40] is None  # there is no frozen prefix any more
    assert not (cached / "cache").exists()  # a finished run leaves none behind


def test_steps_of_several_tasks_start_above_the_prefix_too(runs: Path) -> None:
    assert state_hash(runs / "cached-joined") == state_hash(runs / "uncached-joined")
    shares = [e.get("prefix_hit_share", 0.0) for e in _events(runs / "cached-joined", "step")]
    assert max(shares) == 1.0


def test_a_budget_keeps_the_lower_rows_and_stays_exact(runs: Path) -> None:
    assert state_hash(runs / "small") == state_hash(runs / "uncached-0")
    assert 0 < _events(runs / "small", "phase")[0]["cache_bytes"] <= 60_000
    shares = [e.get("prefix_hit_share", 0.0) for e in _events(runs / "small", "step")]
    assert 0 < max(shares) < 1


def test_a_stopped_run_goes_on_with_what_is_kept_and_with_other_ranks(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    # The bias of the spans' head has no true gradient (a softmax over positions does not see it):
    # with AdamW's usual eps it follows the rounding noise of the number of ranks, by the rate.
    noise = "optim.eps=1e-5"
    train(recipe, ["name=straight", "cache.policy=on", noise])
    train(recipe, ["name=stopped", "cache.policy=on", noise], stop_at=21, exit_code=75)
    folder = tmp_path / "runs/stopped"
    kept = sorted(p.name for p in (folder / "cache" / platform.node()).glob("*.data"))
    # A boundary of three tasks, and that of the phase before until the next one begins.
    assert sorted(name.split(".")[1] for name in kept) == ["2"] * 3 + ["4"] * 3
    _damage(folder / "cache" / platform.node() / kept[0])
    train(recipe, ["name=stopped", "cache.policy=on", noise], resume=True)
    assert state_hash(folder) == state_hash(tmp_path / "runs/straight")
    assert "damaged" in "".join(p.read_text() for p in (folder / "logs").glob("rank*.log"))

    train(recipe, ["name=elastic", "cache.policy=on", noise], stop_at=12, exit_code=75)
    train(recipe, ["name=elastic", "cache.policy=on", noise], world_size=1, resume=True, stop_at=26,
          exit_code=75)  # fmt: skip
    train(recipe, ["name=elastic", "cache.policy=on", noise], resume=True)
    assert _largest_difference(tmp_path / "runs/elastic", tmp_path / "runs/straight") <= 1e-5


def test_what_is_kept_of_a_prefix_that_trained_before_is_there_when_the_run_goes_on(
    tmp_path: Path,
) -> None:
    """The pre-trained weights that a resumed run begins with are not those that were kept."""
    # Everything trains in the first ten steps; then two blocks are frozen, and what is below them.
    frozen = "freezing={policy: bottom_up, groups_per_phase: 3, every: 10step, max_depth: 2}"
    settings = ["cache.policy=on", "freezing.prefix_dropout=false", frozen]
    recipe = _recipe(tmp_path)
    train(recipe, ["name=straight", *settings])
    train(recipe, ["name=stopped", *settings], stop_at=29, exit_code=75)
    train(recipe, ["name=stopped", *settings], resume=True)
    folder = tmp_path / "runs/stopped"
    straight = {e["step"]: e for e in _events(tmp_path / "runs/straight", "step")}
    shares = {e["step"]: e.get("prefix_hit_share") for e in _events(folder, "step")}
    assert shares == {step: e.get("prefix_hit_share") for step, e in straight.items()}
    assert max(share or 0.0 for share in shares.values()) == 1.0
    assert state_hash(folder) == state_hash(tmp_path / "runs/straight")


def test_a_run_killed_soon_after_a_phase_began_repeats_the_phase_before_to_the_bit(
    tmp_path: Path,
) -> None:
    recipe = _recipe(tmp_path)
    assert supervise(recipe, ["name=straight", "cache.policy=on"]).code == 0
    begins = _events(tmp_path / "runs/straight", "phase")[-1]["step"]
    saved = begins - 3
    settings = ["cache.policy=on", f"checkpoint.every={saved}step"]

    def kill(attempt: int, rank: int) -> None:
        def die(call: int) -> None:
            if attempt == 0 and rank == 1 and call == begins + 3:
                os.kill(os.getpid(), signal.SIGKILL)

        before(DeepSpeedEngine, "train_step", die)

    assert supervise(recipe, ["name=killed", *settings], fault=kill).code == 0
    assert [e["step"] for e in _events(tmp_path / "runs/killed", "resume")] == [saved]
    found = [
        {e["step"]: e.get("prefix_hit_share") for e in _events(tmp_path / f"runs/{name}", "step")}
        for name in ("straight", "killed")
    ]
    assert found[0] == found[1]  # nothing that had been kept was computed again
    assert state_hash(tmp_path / "runs/killed") == state_hash(tmp_path / "runs/straight")


def test_files_of_a_phase_that_is_over_stay_until_a_checkpoint_and_within_the_budget(
    tmp_path: Path,
) -> None:
    room = np.full(4, 2)
    about = {"tasks": {"a": CachedTask(room)}, "width": 4, "dtype": torch.float32}
    one = 4 * 2 * 4 * 4

    def left(budget: int, saved: int) -> list[str]:
        folder = tmp_path / f"{budget}-{saved}"
        cache = ActivationCache(folder, budget_bytes=budget, **about)
        cache.open([(3, "f"), (2, "f")])
        cache.saved_step = saved
        cache.open([(2, "f")], step=5)
        return sorted(p.stem for p in folder.glob("*.data"))

    assert left(3 * one, saved=4) == ["a.2.f", "a.3.f"]
    assert left(3 * one, saved=5) == ["a.2.f"]
    assert left(2 * one, saved=4) == ["a.2.f", "a.3.f"]
    assert left(2 * one - 1, saved=4) == ["a.2.f"]


def _says_what_is_saved(path: Path) -> None:
    """Train; write down what this rank takes for saved whenever a phase opens the cache."""
    found: list[tuple[int, int]] = []
    open_cache = ActivationCache.open

    def watched(self: ActivationCache, *args: Any, **kwargs: Any) -> int:
        found.append((kwargs["step"], self.saved_step))
        return open_cache(self, *args, **kwargs)

    ActivationCache.open = watched
    # What is written beside the training is there before the next step ends.
    before(DeepSpeedEngine, "train_step", lambda _: time.sleep(0.1))
    assert build.train(load_recipe(path), resume=False) == 0
    (path.parent / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


def test_every_rank_knows_what_is_saved_when_a_phase_changes(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path,
        checkpoint={"every": "5step", "in_background": True},
        evaluation={"every": None},
        cache={"policy": "on"},
    )
    run_distributed(_says_what_is_saved, path)
    ranks = [json.loads((tmp_path / f"rank{i}.json").read_text()) for i in range(2)]
    assert ranks[0] == ranks[1]
    assert [step for step, _ in ranks[0]] == [0, 8, 16]
    # Heard of between two saves, where nobody waits for one: at step 16 at the latest.
    assert ranks[0][2][1] in (5, 10, 15)


def _damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = next(i for i, byte in enumerate(content) if byte)
    content[place] ^= 1
    path.write_bytes(content)


def _largest_difference(one: Path, other: Path) -> float:
    from safetensors.torch import load_file

    def weights(run: Path) -> dict[str, np.ndarray]:
        """Masters and weights in runs, joined by parameter."""
        newest = sorted((run / "checkpoints").glob("step-*"))[-1]
        parts: dict[str, dict[int, torch.Tensor]] = {}
        for file in newest.glob("*.safetensors"):
            for key, value in load_file(file).items():
                kind, parameter, start = key.split("|")
                if kind == "weight":
                    parts.setdefault(parameter, {})[int(start)] = value
        return {n: np.concatenate([p[s] for s in sorted(p)]) for n, p in parts.items()}

    left, right = weights(one), weights(other)
    return max(float(np.abs(left[n] - right[n]).max()) for n in left)


def test_versions_of_augmented_rows_are_kept(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    content = yaml.safe_load(recipe.read_text())
    content["freezing"] = {"policy": "static", "depth": 2}
    content["tasks"] = content["tasks"][:2]
    noise = {"type": "character_noise", "share": 0.5}
    content["tasks"][0]["augmentation"] = [noise, {"type": "word_dropout", "share": 0.3}]
    recipe.write_text(yaml.safe_dump(content))
    fixed = ["cache.variants=2", "engine.zero_stage=0"]
    train_in_turn(
        recipe,
        [["name=uncached", *fixed, *UNCACHED], ["name=cached", *fixed, "cache.policy=on"]],
    )
    root = tmp_path / "runs"
    assert state_hash(root / "cached") == state_hash(root / "uncached")
    found = [e for e in _events(root / "cached", "step") if e["task"] == "text"]
    # 48 rows are 6 steps: the third epoch of a task finds what the first one left.
    early, late = found[:12], found[13:]
    assert all(e["prefix_hit_share"] == 0.0 for e in early)
    assert sum(e["prefix_hit_share"] for e in late) / len(late) > 0.8
    assert all(e["cache_wait_s"] >= 0 for e in found)


def _measured(path: Path, name: str, resume: bool, stop_at: int | None) -> None:
    """Train by policy auto; one rank finds that a prefix costs nothing, the other half a us."""
    factor = {"0": 0.0, "1": 1e-3}[os.environ["RANK"]]
    add = CacheProbe.add

    def faster(self: CacheProbe, keys: RowKeys, *, compute_s: float, **rest: Any) -> None:
        add(self, keys, compute_s=compute_s * factor, **rest)

    CacheProbe.add = faster
    recipe = load_recipe(path, overrides=[f"name={name}", "cache.policy=auto"])
    if stop_at is not None and factor:
        metrics = recipe.output_dir / recipe.name / "metrics.jsonl"
        threading.Thread(target=terminate_at, args=(metrics, stop_at), daemon=True).start()
    assert build.train(recipe, resume=resume) == (75 if stop_at else 0)


def test_a_cache_that_does_not_pay_is_left_by_all_ranks_and_stays_so(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    train(recipe, ["name=uncached", *UNCACHED])
    run_distributed(_measured, recipe, "measured", False, 14)
    run_distributed(_measured, recipe, "measured", True, None)
    run = tmp_path / "runs/measured"
    assert state_hash(run) == state_hash(tmp_path / "runs/uncached")
    (decision,) = _events(run, "cache")
    assert not decision["used"]
    assert decision["step"] == 5
    assert 0 < decision["compute_s"] < decision["read_s"]
    hits = {e["step"]: e.get("prefix_hit_share") for e in _events(run, "step")}
    assert hits[5] == 0.0
    assert hits[6] is None
    # Less deep prefixes pay even less.
    assert [p["cached_blocks"] for p in _events(run, "phase")] == [4, 0, 0]


def test_what_pays_depends_on_depth_and_on_how_often_rows_come() -> None:
    costs = CacheDecision(
        step=5, boundary=4, visits=3.0, compute_s=8e-6, write_s=4e-6, read_s=2e-6, from_disk=False
    )
    # 2 us of compute a block, against 2 us to read and 2 us as a share of one write.
    assert [costs.pays(b) for b in (0, 1, 2, 3, 4)] == [False, False, False, True, True]
    assert not replace(costs, visits=1.25).pays(4)
    assert not replace(costs, read_s=None).pays(4)


def test_weights_that_trained_below_the_boundary_are_noticed(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    content = yaml.safe_load(recipe.read_text())
    content["freezing"] = {
        "policy": "explicit",
        "phases": [
            {"at": "0step", "trainable": ["head.*", "pooler"]},
            {"at": "12step", "trainable": ["all"]},
            {"at": "16step", "trainable": ["head.*", "pooler", "block.3"]},
        ],
    }
    recipe.write_text(yaml.safe_dump(content))
    train_in_turn(recipe, [["name=uncached", *UNCACHED], ["name=cached", "cache.policy=on"]])
    assert state_hash(tmp_path / "runs/cached") == state_hash(tmp_path / "runs/uncached")


def _keys(rows: list[int], *, variants: list[int] | None = None) -> RowKeys:
    lengths = np.array([3, 1, 2])
    which = np.array(variants or [0] * len(rows))
    return RowKeys("a", np.array(rows), which, lengths[rows] + which)


def _cache(folder: Path, **tasks: Any) -> ActivationCache:
    return ActivationCache(folder / "c", tasks, 4, torch.float32, budget_bytes=10**6)


def test_a_row_is_there_from_the_next_step_on(tmp_path: Path) -> None:
    task = CachedTask(np.array([3, 1, 2]))
    cache = _cache(tmp_path, a=task)
    assert cache.open([(2, "f")]) == 6 * 4 * 4
    hidden = torch.randn(5, 4)
    cache.write(2, keys=_keys([2, 0]), hidden=hidden, step=7)
    found = cache.read(2, keys=_keys([0, 1, 2]), step=7)
    assert not found.there.any()
    assert found.hidden.shape == (0, 4)
    other = _cache(tmp_path, a=task)
    other.open([(2, "f")])  # another process of the host
    found = other.read(2, keys=_keys([0, 1, 2]), step=8)
    assert found.there.tolist() == [True, False, True]
    assert torch.equal(found.hidden, torch.cat([hidden[2:], hidden[:2]]))
    assert not other.complete(2)
    other.open([(2, "g")])  # other weights below the boundary
    assert not other.read(2, keys=_keys([2, 0]), step=9).there.any()
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["a.2.g.data", "a.2.g.index"]
    other = _cache(tmp_path, a=CachedTask(task.room, data="others"))
    other.open([(2, "g")])  # other data under the same name
    assert not list((tmp_path / "c").glob("a.2.g.data"))


def test_what_is_deleted_is_closed_before_anything_new_takes_its_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[list[str]] = []
    make = ActivationCache._make

    def looked(self: ActivationCache, *arguments: Any, **options: Any) -> Any:
        files = [str(link.resolve()) for link in Path("/proc/self/fd").iterdir()]
        maps = Path("/proc/self/maps").read_text().splitlines()
        held.append([x for x in (*maps, *files) if f"{tmp_path}/c/" in x])
        return make(self, *arguments, **options)

    cache = _cache(tmp_path, a=CachedTask(np.array([3, 1, 2])))
    cache.open([(2, "f")])
    cache.write(2, keys=_keys([2]), hidden=torch.randn(2, 4), step=1)
    monkeypatch.setattr(ActivationCache, "_make", looked)
    cache.open([(2, "g")])
    assert held == [[]]


def test_a_folder_that_can_not_be_made_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file")
    task = CachedTask(np.array([3, 1, 2]))
    cache = _cache(tmp_path, a=task)
    assert cache.open([(2, "f")]) == 0
    cache.write(2, keys=_keys([2]), hidden=torch.randn(2, 4), step=1)
    assert not cache.read(2, keys=_keys([2]), step=2).there.any()


def test_a_file_that_another_rank_has_open_on_nfs_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def busy(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith(".nfs"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", busy)
    (tmp_path / "c").mkdir()
    for name in (".nfs0000000000000001", "a.2.old.data"):
        (tmp_path / "c" / name).write_text("")
    cache = _cache(tmp_path, a=CachedTask(np.array([3, 1, 2])))
    assert cache.open([(2, "f")]) == 6 * 4 * 4
    names = [".nfs0000000000000001", "a.2.f.data", "a.2.f.index"]
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_made_anew(
    dtype: torch.dtype, bad: float, tmp_path: Path
) -> None:
    task = CachedTask(np.array([3, 1, 2]))
    cache = ActivationCache(tmp_path / "c", {"a": task}, 4, dtype, budget_bytes=10**6)
    cache.open([(2, "f")])
    keys = _keys([0, 1, 2])
    hidden = torch.randn(6, 4).to(dtype)
    spoilt = hidden.clone()
    spoilt[3, 2] = bad  # of row 1, its only token
    spoilt[5, 0] = bad  # of row 2, its last one
    cache.write(2, keys=keys, hidden=spoilt, step=1)
    assert cache.read(2, keys=keys, step=2).there.tolist() == [True, False, False]
    cache.write(2, keys=keys, hidden=hidden, step=2)
    found = cache.read(2, keys=keys, step=3)
    assert found.there.all()
    assert torch.equal(found.hidden, hidden)
    # What was kept stays, even if a later step makes it badly.
    cache.write(2, keys=keys, hidden=spoilt, step=3)
    assert torch.equal(cache.read(2, keys=keys, step=4).hidden, hidden)


def test_versions_of_a_row_are_kept_apart_and_what_is_too_long_is_not(tmp_path: Path) -> None:
    cache = _cache(tmp_path, a=CachedTask(np.array([4, 2, 2]), variants=2))
    assert cache.open([(1, "f")]) == 2 * 8 * 4 * 4
    keys = _keys([0, 2, 0], variants=[0, 1, 1])  # the second has 3 tokens and room for 2
    hidden = torch.randn(int(keys.lengths.sum()), 4)
    cache.write(1, keys=keys, hidden=hidden, step=0)
    found = cache.read(1, keys=keys, step=1)
    assert found.there.tolist() == [True, False, True]
    assert torch.equal(found.hidden, torch.cat([hidden[:3], hidden[6:]]))
    other = RowKeys("a", keys.rows, keys.variants, keys.lengths - 1)
    assert not cache.read(1, keys=other, step=1).there.any()  # not the same rows


def test_what_was_read_ahead_is_used_unless_more_is_there(tmp_path: Path) -> None:
    cache = _cache(tmp_path, a=CachedTask(np.array([3, 1, 2])))
    cache.open([(1, "f")])
    keys, hidden = _keys([1, 2]), torch.randn(3, 4)
    early = cache.read_ahead(1, keys=keys, step=2)
    assert early is not None
    assert cache.read(1, keys=keys, step=2, early=early) is early
    cache.write(1, keys=keys, hidden=hidden, step=1)
    found = cache.read(1, keys=keys, step=2, early=early)
    assert torch.equal(found.hidden, hidden)
    early = cache.read_ahead(1, keys=keys, step=3)
    assert cache.read(1, keys=keys, step=3, early=early) is early
    path = next((tmp_path / "c").glob("*.data"))
    path.write_bytes(path.read_bytes()[:-8])  # the last row is cut
    early = cache.read_ahead(1, keys=keys, step=4)
    found = cache.read(1, keys=keys, step=4, early=early)
    assert found.there.tolist() == [True, False]
    assert torch.equal(found.hidden, hidden[:1])
    assert cache.damaged == 1
    cache.open([(1, "f")])
    assert cache.read(1, keys=keys, step=4, early=early) is not early  # of another phase


def test_a_full_disk_turns_the_cache_off_and_not_the_run_down(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # More than any disk of a test machine has.
    tasks = {"a": CachedTask(np.array([3, 2**40]))}
    cache = ActivationCache(tmp_path / "c", tasks, 4, torch.float32, budget_bytes=2**62)
    assert cache.open([(2, "f")]) == 0
    assert "can't hold" in caplog.text
    cache.write(2, keys=_keys([0]), hidden=torch.zeros(3, 4), step=0)
    assert not cache.read(2, keys=_keys([0]), step=5).there.any()


def _disk_is_full(file: int, start: int, size: int) -> None:
    raise OSError(errno.ENOSPC, f"no room for {size} bytes from {start} on in file {file}")


def test_a_full_disk_of_one_process_takes_no_file_from_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, hidden = CachedTask(np.array([3, 1, 2])), torch.randn(6, 4)
    # As open files, they are to each other what those of several processes are.
    one, other, third = (_cache(tmp_path, a=task) for _ in range(3))
    one.open([(2, "f")])
    one.write(2, keys=_keys([0]), hidden=hidden[:3], step=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", _disk_is_full)
        assert other.open([(2, "f")]) == 0
    third.open([(2, "f")])
    one.write(2, keys=_keys([1, 2]), hidden=hidden[3:], step=2)
    found = third.read(2, keys=_keys([0, 1, 2]), step=3)
    assert found.there.all()
    assert torch.equal(found.hidden, hidden)
    del one, third, found
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", _disk_is_full)
        assert other.open([(2, "f")]) == 0
    assert not list((tmp_path / "c").iterdir())  # what nobody uses must not fill the disk


def test_a_row_that_can_not_be_written_ends_the_keeping_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = _cache(tmp_path, a=CachedTask(np.array([3, 1, 2])))
    cache.open([(2, "f")])
    hidden = torch.randn(6, 4)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # Room for the first row, and for a part of the second one.
        limit_files(3 * 4 * 4 + 4)
        cache.write(2, keys=_keys([0, 1, 2]), hidden=hidden, step=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caplog.text.count("no more are kept") == 1
    cache.write(2, keys=_keys([2]), hidden=hidden[4:], step=2)
    found = cache.read(2, keys=_keys([0, 1, 2]), step=9)
    assert found.there.tolist() == [True, False, False]
    assert torch.equal(found.hidden, hidden[:3])
    assert cache.damaged == 0
