"""The cached frozen prefix changes no bit of a run, whatever happens to the run or to the cache."""

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dist_ft.freezing.activation_cache import ActivationCache, CachedTask
from dist_ft.freezing.row_store import RowKeys
from tests.helpers.tiny_run import state_hash, train, write_recipe

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


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16"), (3, "fp32")])
def test_cached_equals_uncached_bit_for_bit(stage: int, precision: str, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    engine = [f"engine.zero_stage={stage}", f"engine.precision={precision}"]
    train(recipe, ["name=uncached", *engine, *UNCACHED])
    train(recipe, ["name=cached", *engine, "cache.policy=on"])
    root = tmp_path / "runs"
    assert state_hash(root / "cached") == state_hash(root / "uncached")
    phases = _events(root / "cached", "phase")
    assert [p["cached_blocks"] for p in phases] == [4, 2, 0]
    assert phases[0]["cache_bytes"] > phases[1]["cache_bytes"] > 0
    assert all(p["cached_blocks"] == 0 for p in _events(root / "uncached", "phase"))
    hits = {e["step"]: e.get("prefix_hit_share") for e in _events(root / "cached", "step")}
    assert hits[1] == 0.0  # the first step has to compute
    assert hits[26] == 1.0  # an epoch and a phase later nothing has
    assert hits[40] is None  # there is no frozen prefix any more
    assert not (root / "cached/cache").exists()  # a finished run leaves none behind


def test_a_stopped_run_goes_on_with_what_is_kept_and_with_other_ranks(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    train(recipe, ["name=straight", "cache.policy=on"])
    train(recipe, ["name=stopped", "cache.policy=on"], stop_at=21, exit_code=75)
    folder = tmp_path / "runs/stopped"
    kept = sorted(p.name for p in (folder / "cache" / platform.node()).glob("*.data"))
    assert len(kept) == 3  # a boundary of three tasks
    _damage(folder / "cache" / platform.node() / kept[0])
    train(recipe, ["name=stopped", "cache.policy=on"], resume=True)
    assert state_hash(folder) == state_hash(tmp_path / "runs/straight")
    assert "damaged" in "".join(p.read_text() for p in (folder / "logs").glob("rank*.log"))

    train(recipe, ["name=elastic", "cache.policy=on"], stop_at=12, exit_code=75)
    train(recipe, ["name=elastic", "cache.policy=on"], world_size=1, resume=True, stop_at=26,
          exit_code=75)  # fmt: skip
    train(recipe, ["name=elastic", "cache.policy=on"], resume=True)
    assert _largest_difference(tmp_path / "runs/elastic", tmp_path / "runs/straight") <= 1e-5


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


def test_a_budget_keeps_the_lower_rows_and_stays_exact(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    train(recipe, ["name=uncached", *UNCACHED])
    train(recipe, ["name=small", "cache.policy=on", "cache.budget_gb=6e-5"])
    root = tmp_path / "runs"
    assert state_hash(root / "small") == state_hash(root / "uncached")
    assert 0 < _events(root / "small", "phase")[0]["cache_bytes"] <= 60_000
    shares = [e.get("prefix_hit_share", 0.0) for e in _events(root / "small", "step")]
    assert 0 < max(shares) < 1


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
    train(recipe, ["name=uncached", *UNCACHED])
    train(recipe, ["name=cached", "cache.policy=on"])
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
