"""Which evaluation is best, when a run ends early, and what is exported then."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock, Mock

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dist_ft import dist
from dist_ft.recipe import load_recipe
from dist_ft.recipe.errors import RecipeError
from dist_ft.train import ending, finished, saving
from dist_ft.train.best import Decision, updated
from dist_ft.train.callbacks import Evaluate
from dist_ft.train.checkpoint import CheckpointReader, known_checkpoints, remove_old
from dist_ft.train.console import Console
from dist_ft.train.evaluate import EvalData, Scores
from dist_ft.train.loop import Best
from dist_ft.train.numbers import BadNumbersError
from dist_ft.train.recorder import Recorder
from dist_ft.train.retention import Retention
from dist_ft.train.run_folder import RunFolder
from tests.helpers.tiny_run import events, train, write_recipe

NAN = float("nan")
SCORES = {"a": 0.5, "b": 0.9}


def test_scores_decide_each_or_together() -> None:
    assert Decision("each").scores(SCORES) == SCORES
    assert Decision("mean").scores(SCORES) == {"mean": pytest.approx(0.7)}
    assert Decision("worst").scores(SCORES) == {"worst": 0.5}
    weighted = Decision("weighted", {"b": 3.0}).scores(SCORES)
    assert weighted == {"weighted (b: 3)": pytest.approx(0.8)}
    assert Decision("worst").scores({}) == {}
    assert [Decision(by).name_for("a") for by in ("each", "mean")] == ["a", "mean"]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.sampled_from([0.0, 0.1]))
def test_the_best_is_the_first_of_the_largest(scores: list[float], min_delta: float) -> None:
    best = {}
    for step, score in enumerate(scores):
        best = updated(best, scores={"a": score}, step=step, min_delta=min_delta)
    if min_delta == 0:
        assert best["a"]["step"] == scores.index(max(scores))
    assert max(scores) <= best["a"]["score"] + min_delta
    assert best["a"]["stale"] == len(scores) - 1 - best["a"]["step"]


def test_a_score_that_is_no_number_is_the_worst(tmp_path: Path) -> None:
    task = SimpleNamespace(name="a", primary_metric=("mse", False))
    evaluate = Evaluate(
        recorder=Recorder(None),
        console=Console(main=False, every=1),
        world=dist.World(rank=0, local_rank=0, world_size=1),
        data=[EvalData(cast("Any", task), "validation", cast("Any", None), cast("Any", None), 1)],
        every=None,
        done_at=10,
    )
    best: dict[str, Best] = {}
    for step, mse in ((10, NAN), (20, 0.9), (30, NAN), (40, 0.5)):
        evaluate.done_at = step
        evaluate.last = {"a": Scores("a", "validation", {"mse": mse}, 0.0)}
        scores = evaluate.deciding_scores(step)
        best = updated(best, scores=scores, step=step, min_delta=0.1)
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        (folder / "manifest.json").touch()
        (folder / "trainer.json").write_text(json.dumps({"scores": scores}))
    assert best == {"a": {"score": -0.5, "step": 40, "stale": 0}}
    # Of a checkpoint and of a best score that an earlier version has written, too.
    (tmp_path / "step-00000010" / "trainer.json").write_text('{"scores": {"a": NaN}}')
    kept = Retention(keep_last=1, keep_best=True).keeps(known_checkpoints(tmp_path), newest=50)
    assert kept == {40, 50}
    before: dict[str, Best] = {"a": {"score": NAN, "step": 10, "stale": 3}}
    assert updated(before, scores={"a": 0.1}, step=20, min_delta=0.1)["a"]["step"] == 20


def test_names_that_are_scored_no_more_do_not_keep_a_run_from_ending() -> None:
    best: dict[str, Best] = {"text": {"score": 0.9, "step": 8, "stale": 0}}
    for step in (10, 12, 14):  # evaluation.decide_by was changed to mean at a resume
        best = updated(best, scores={"mean": 0.1}, step=step, min_delta=0.0)
    assert best == {"mean": {"score": 0.1, "step": 10, "stale": 2}}
    assert updated(best, scores={}, step=16, min_delta=0.0) == best


def test_a_run_that_gets_no_better_ends_and_stays_ended(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path,
        evaluation={"every": "2step", "early_stopping": {"patience": 2, "min_delta": 1.0}},
        checkpoint={"keep_last": 1, "keep_best": True, "every": "4step"},
    )
    train(path)
    run = tmp_path / "runs" / "tiny"
    [stopped] = [e for e in events(run) if e["event"] == "early_stop"]
    # The first evaluation set what no later one beat by 1.
    assert stopped["step"] == 6
    assert {b["step"] for b in stopped["best"].values()} == {2}
    assert {e["step"] for e in events(run) if e["event"] == "step"} == set(range(1, 7))
    saved = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert saved == ["step-00000002", "step-00000006"]

    train(path, resume=True)
    assert max(e["step"] for e in events(run) if e["event"] == "step") == 6

    [folder] = finished.export(run, task="text", how=finished.ExportOptions(best=True))
    import transformers

    exported = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    reader = CheckpointReader(run / "checkpoints" / "step-00000002")
    weight = exported.get_parameter("classifier.weight").detach()
    name = "heads.text.classifier.weight"
    saved_weight = reader.read("weight", name, start=0, length=weight.numel())
    assert saved_weight is not None
    assert torch.equal(weight.view(-1), saved_weight)

    before = {p.name for p in folder.iterdir()}
    (folder / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"exists already: add --replace"):
        finished.export(run, task="text")
    [again] = finished.export(run, task="text", how=finished.ExportOptions(replace=True))
    assert {p.name for p in again.iterdir()} == before
    assert [p.name for p in again.parent.iterdir()] == ["text"]

    patient = yaml.safe_load(path.read_text())
    patient["evaluation"]["early_stopping"]["patience"] = 9
    path.write_text(yaml.safe_dump(patient))
    train(path, resume=True)
    assert max(e["step"] for e in events(run) if e["event"] == "step") == 20


def test_a_checkpoint_is_best_by_the_rule_that_holds_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finished, "verify_checkpoint", lambda _: None)
    monkeypatch.setattr(finished, "CheckpointReader", lambda folder: folder)
    # evaluation.decide_by was changed from each to mean at a resume at step 2.
    for step, scores in ((2, {"text": 0.9, "tags": 0.1}), (6, {"mean": 0.7})):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        (folder / "manifest.json").touch()
        (folder / "trainer.json").write_text(json.dumps({"scores": scores}))
    for name in ("mean", "text"):
        best = finished.best_checkpoint(tmp_path, name=name, scores={2: 0.5, 6: 0.7})
        assert best == tmp_path / "step-00000006"
    assert Decision("weighted", {"b": 2.0, "a": 1.0}).name == "weighted (a: 1, b: 2)"
    assert Decision("weighted", {"b": 2.0}).scores({"a": 0.0, "b": 1.0}) == {
        "weighted (b: 2)": pytest.approx(2 / 3)
    }


def test_a_resume_keeps_the_recipe_that_holds_from_then_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    recipe = load_recipe(write_recipe(tmp_path)).model_dump(mode="json")
    folder.start(recipe, resume=False)
    changed = {**recipe, "evaluation": {**recipe["evaluation"], "decide_by": "mean"}}
    folder.start(changed, resume=True)
    assert folder.read_recipe() == recipe  # something else may refuse it still
    folder.goes_on(changed)
    assert folder.read_recipe() == changed


def test_a_checkpoint_that_cannot_be_read_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (2, 4, 6):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        (folder / "manifest.json").touch()
        (folder / "trainer.json").write_text("{}")
    read_text, retention = Path.read_text, Retention(keep_last=1)

    def failing(path: Path, *arguments: Any, **options: Any) -> str:
        if path.parent.name == "step-00000002":
            raise OSError(errno.EIO, "a network that is gone for a while")
        return read_text(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", failing)
        remove_old(tmp_path, step=6, retention=retention)
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000002", "step-00000006"}
    remove_old(tmp_path, step=6, retention=retention)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000006"]


def test_a_card_has_no_scores_of_other_weights(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "metrics.jsonl")
    recorder.event("eval", step=2, task="a", split="validation", metrics={"f1": 0.5})
    recorder.close()
    assert finished.last_scores(tmp_path / "metrics.jsonl", step=2) == {"a": {"f1": 0.5}}
    assert finished.last_scores(tmp_path / "metrics.jsonl", step=3) == {}


def test_bad_numbers_lose_no_save_that_was_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Mock()
    monkeypatch.setattr(ending, "fit", Mock(side_effect=BadNumbersError("a loss that is none")))
    monkeypatch.setattr(ending, "checkpoint_of", lambda _: saver)
    run, memory = Mock(), MagicMock()
    memory.watching.return_value.__exit__.return_value = None
    with pytest.raises(BadNumbersError):
        ending.train_to_end(run, memory)
    saver.settle.assert_called_once_with(run)


def test_a_save_is_made_on_this_ranks_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[int] = []
    monkeypatch.setattr(saving, "_on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    writer = saving.CheckpointWriter(tmp_path, retention=Retention())
    writer._thread.submit(lambda: None).result()
    writer.close()
    assert devices == [3]


def test_what_cannot_decide_is_refused(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path,
        evaluation={
            "every": None,
            "decide_by": "mean",
            "weights": {"txt": 2.0},
            "early_stopping": {"patience": 2},
        },
    )
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides=["tasks.text.problem=regression", "tasks.text.metric=mse"])
    text = str(error.value)
    assert "evaluation.early_stopping: needs scores while training goes on" in text
    assert "evaluation.weights.txt: must be the name of a task: did you mean text?" in text
    assert "evaluation.weights: are of no use with decide_by mean" in text
    assert "task text is decided by mse" in text


@pytest.fixture(scope="module")
def kept_last(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that was scored at steps 2, 4 and 6, of which only the last is still there."""
    path = write_recipe(
        tmp_path_factory.mktemp("kept"),
        train={"max_duration": "6step"},
        evaluation={"every": "2step"},
        checkpoint={"keep_last": 1, "every": "2step"},
    )
    recipe = yaml.safe_load(path.read_text())
    recipe["freezing"] = {"policy": "none"}
    recipe["tasks"] = recipe["tasks"][:1]
    path.write_text(yaml.safe_dump(recipe))
    train(path, world_size=1)
    return path.parent / "runs" / "tiny"


def _rescore(run: Path, by_step: dict[int, float]) -> None:
    """Write other accuracies into the record of a run."""
    found = events(run)
    for event in found:
        if event["event"] == "eval" and event["step"] in by_step:
            event["metrics"]["accuracy"] = by_step[event["step"]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in found))


def test_the_best_evaluation_is_not_exported_from_another_step(kept_last: Path) -> None:
    how = finished.ExportOptions(best=True, replace=True)
    [kept] = known_checkpoints(kept_last / "checkpoints")
    assert kept.step == 6
    score = kept.scores["text"]
    _rescore(kept_last, {2: score - 0.1, 4: score + 0.1})
    with pytest.raises(ValueError, match=r"step 4.* step 6.*checkpoint\.keep_best"):
        finished.export(kept_last, how=how)
    _rescore(kept_last, {2: score + 0.2, 4: score + 0.2})
    with pytest.raises(ValueError, match=r"best at step 2,"):
        finished.export(kept_last, how=how)
    for gone in (score, NAN, score - 0.1):
        _rescore(kept_last, {2: gone, 4: score})
        assert len(finished.export(kept_last, how=how)) == 1
    # What was undone does not count.
    _rescore(kept_last, {4: score + 0.1})
    resumed = {"event": "resume", "step": 2, "time_s": 0.0, "path": "step-00000002"}
    with (kept_last / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(resumed) + "\n")
    assert len(finished.export(kept_last, how=how)) == 1


def test_scores_of_the_record_are_larger_when_better(tmp_path: Path) -> None:
    tasks = [
        SimpleNamespace(name="a", primary_metric=("mse", False)),
        SimpleNamespace(name="b", primary_metric=("f1", True)),
    ]
    recorder = Recorder(tmp_path / "metrics.jsonl")
    for step, mse, f1 in ((2, 0.5, 0.25), (4, 0.25, 0.5), (6, NAN, 0.75)):
        recorder.event("eval", step=step, task="a", split="validation", metrics={"mse": mse})
        recorder.event("eval", step=step, task="a", split="test", metrics={"mse": 0.0})
        recorder.event("eval", step=step, task="b", split="validation", metrics={"f1": f1})
    recorder.event("eval", step=8, task="b", split="validation", metrics={"f1": 1.0})
    recorder.close()

    def scores(by: str) -> dict[int, dict[str, float]]:
        decision = Decision(cast("Any", by))
        return finished._deciding_scores(tmp_path / "metrics.jsonl", cast("Any", tasks), decision)

    assert scores("each")[2] == {"a": -0.5, "b": 0.25}
    assert scores("each")[6] == {"a": -math.inf, "b": 0.75}
    assert scores("mean") == {2: {"mean": -0.125}, 4: {"mean": 0.125}, 6: {"mean": -math.inf}}
