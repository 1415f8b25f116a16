"""dist_ft from Python: the examples of the documentation, run as they stand."""

import gc
import json
import logging
import math
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock
from unittest.mock import Mock

import pytest
import torch
import yaml

import dist_ft
from dist_ft.tasks.base import Choice, LossSum
from dist_ft.tasks.output_regularization import OutputRegularizer
from dist_ft.train import build
from tests.helpers.run_distributed import run_distributed
from tests.helpers.tiny_run import events, write_recipe

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe like that of the tutorial, which takes a second."""
    place = tmp_path_factory.mktemp("api")
    path = write_recipe(place, engine={"zero_stage": 0, "type": "reference"})
    body = yaml.safe_load(path.read_text())
    body["tasks"] = [{**body["tasks"][0], "name": "kind"}]
    body["train"]["max_duration"] = "9step"
    body.pop("evaluation")
    (place / "tickets.yaml").write_text(yaml.safe_dump(body))
    return place


def _run_example(name: str, folder: Path) -> None:
    os.chdir(folder)
    found = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    kept: dict[str, Any] = {k: found[k] for k in ("scores", "page", "folders") if k in found}
    scores = found["run"].evaluate()
    (folder / f"{name}.json").write_text(json.dumps({**kept, "scored": scores}, default=str))


@pytest.mark.parametrize("name", ["notebook", "custom_task", "custom_policy", "custom_regularizer"])
def test_an_example_runs(name: str, folder: Path) -> None:
    run_distributed(_run_example, name, folder, world_size=1)
    found = json.loads((folder / f"{name}.json").read_text())
    assert "accuracy" in found["scored"]["kind"]["validation"]
    if name == "notebook":
        assert found["scores"]["kind"] == found["scored"]["kind"]["validation"]
        assert Path(found["page"]).is_file()
        assert (Path(found["folders"][0]) / "config.json").is_file()
    if name == "custom_policy":
        phases = [e["trainable_groups"] for e in events(folder / "runs/middle-out")
                  if e["event"] == "phase"]  # fmt: skip
        assert phases[0] == ["block.2", "pooler", "head.kind"]
        assert phases[1] == ["block.1", "block.2", "block.3", "pooler", "head.kind"]
        assert len(phases) == 3


def _with_two_ranks(folder: Path) -> None:
    os.chdir(folder)
    run = dist_ft.fine_tune("tickets.yaml", overrides=["name=pair", "engine.type=deepspeed"])
    assert torch.distributed.is_initialized()  # opened by the caller, and still there
    assert run.is_main == (torch.distributed.get_rank() == 0)
    if run.is_main:
        run.export()
        run.evaluate()
        return
    for what in ("evaluate", "export", "report"):
        with pytest.raises(RuntimeError, match=f"{what}: rank 1 would write what rank 0 writes"):
            getattr(run, what)()


def test_one_rank_goes_on_with_a_run(folder: Path) -> None:
    run_distributed(_with_two_ranks, folder, world_size=2)
    assert (folder / "runs" / "pair" / "export" / "kind" / "config.json").is_file()


STOPPED = """
import os, signal, threading, time
from pathlib import Path
import dist_ft
def stop():
    record = Path("runs/cut/metrics.jsonl")
    while not (record.is_file() and '"event": "step"' in record.read_text()):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=stop, daemon=True).start()
dist_ft.fine_tune("tickets.yaml", overrides=["name=cut", "train.max_duration=5000step"])
print("went on")
"""


def test_a_program_that_is_stopped_does_not_go_on(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STOPPED], cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 75, done.stderr[-2000:]
    assert "went on" not in done.stdout
    assert list((folder / "runs" / "cut" / "checkpoints").glob("step*"))


def _twice(folder: Path) -> None:
    os.chdir(folder)
    place = {n: os.environ.pop(n, None) for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    torch.distributed.destroy_process_group()
    logger = logging.getLogger("dist_ft")
    before = (list(logger.handlers), logger.propagate, dict.fromkeys(place, None))
    sizes: list[int] = []
    for name in ("first", "second"):
        dist_ft.fine_tune("tickets.yaml", overrides=[f"name={name}"])
        sizes.append((folder / "runs" / "first" / "logs" / "rank0.log").stat().st_size)
        left = {n: os.environ.get(n) for n in place}
        assert (list(logger.handlers), logger.propagate, left) == before
        assert not torch.distributed.is_initialized()
    assert sizes[0] == sizes[1] > 0


def test_a_run_leaves_its_process_as_it_was(folder: Path) -> None:
    run_distributed(_twice, folder, world_size=1)


def _fails(folder: Path) -> None:
    os.chdir(folder)
    seen: list[Any] = []
    tracker = Mock()

    def broken(outputs: Any) -> torch.Tensor:
        if len(seen) < 3:
            seen.append(outputs)
            return torch.zeros(())
        raise RuntimeError("an error of the program's own")

    # A notebook keeps the error, and with it whatever its frames refer to.
    with (
        mock.patch.object(build, "make_trackers", return_value=[tracker]),
        pytest.raises(RuntimeError, match="own") as caught,
    ):
        dist_ft.fine_tune("tickets.yaml", overrides=["name=broken"], regularizers={"kind": broken})
    parameters = [o for o in gc.get_objects() if isinstance(o, torch.nn.Parameter)]
    assert caught.tb is not None
    tracker.close.assert_called_once_with(failed=True)
    assert parameters
    assert not any(p.numel() for p in parameters)


def test_a_run_that_fails_frees_its_weights(folder: Path) -> None:
    run_distributed(_fails, folder, world_size=1)


def test_an_own_task_trains_otherwise_and_has_shards_of_its_own(folder: Path) -> None:
    plain, focal = (
        [e["loss"] for e in events(folder / "runs" / name) if e["event"] == "step"]
        for name in ("notebook", "focal")
    )
    assert focal[0] < plain[0]  # the focal loss is smaller on every row
    assert len(list((folder / "data" / "kind").glob("train*"))) >= 1


def test_an_own_regularizer_is_in_the_training_loss_alone(folder: Path) -> None:
    losses: dict[str, list[float]] = {}
    for name in ("notebook", "less-sure"):
        found = events(folder / "runs" / name)
        losses[name] = [e["loss"] for e in found if e["event"] == "step"]
    # Minus a tenth of the entropy of two classes, log 2 at most, which new heads nearly have.
    first = losses["notebook"][0] - losses["less-sure"][0]
    assert 0.05 < first < 0.1 * math.log(2) + 0.005
    with pytest.raises(ValueError, match="regularizers: the recipe has no task spans"):
        dist_ft.fine_tune(
            folder / "tickets.yaml", regularizers={"spans": lambda _: torch.zeros(())}
        )


def test_an_own_regularizer_comes_on_top_of_the_recipes() -> None:
    choices = [Choice(torch.randn(4, 3), torch.tensor([0, 2, 1, 1]))]
    plain = OutputRegularizer(lambda *_: LossSum(torch.tensor(7.0), torch.tensor(4)),
                              lambda *_: choices)  # fmt: skip
    for smoothing in (0.0, 0.1):
        base = replace(plain, label_smoothing=smoothing)
        own = replace(base, penalty=lambda given: 2.0 * given[0].logits.sum())
        expected = base(None, {}) + 2.0 * choices[0].logits.sum()
        torch.testing.assert_close(own(None, {}), expected)


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("custom_*.py"):
        code = [line for line in path.read_text().splitlines() if line.strip()]
        assert len(code) <= 30, path


def test_importing_costs_nothing_and_every_name_is_there() -> None:
    code = "import sys, dist_ft; sys.exit(any(m in sys.modules for m in ('torch', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    for name in dist_ft.__all__:
        assert name == "__version__" or getattr(dist_ft, name).__doc__, name
    assert set(dist_ft.__all__) <= set(dir(dist_ft))
    unknown = "trane"
    with pytest.raises(AttributeError, match="no attribute 'trane'"):
        getattr(dist_ft, unknown)


def test_wrong_use_is_named(folder: Path) -> None:
    recipe = dist_ft.load_recipe(folder / "tickets.yaml")
    with pytest.raises(ValueError, match="give them to load_recipe"):
        dist_ft.plan(recipe, overrides=["seed=1"])
    assert dist_ft.plan(recipe, gpu="t4-16g").fits
    with pytest.raises(ValueError, match="holds no run"):
        dist_ft.open_run(folder)
    with pytest.raises(ValueError, match="the recipe has no task spans; its tasks are kind"):
        dist_ft.fine_tune(recipe, tasks={"spans": dist_ft.TextClassification})
