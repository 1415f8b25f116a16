"""From recipe to steps: mixture, layout and augmentation reach the loader; `dist-ft data`."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import BertConfig, BertModel

from dist_ft import cli
from dist_ft.config import Recipe
from dist_ft.data.loader import StepLoader
from dist_ft.data.schema import RAW_COLUMN
from dist_ft.model.backbone import load_tokenizer
from dist_ft.recipe import load_recipe
from dist_ft.train.data import PreparedTask, prepare_tasks
from dist_ft.train.loading import StepPlan, make_loader, plan_steps
from dist_ft.train.parts import check_vocabulary, make_parts, model_source
from tests.helpers.tiny_run import write_recipe

AUGMENTATION: dict[str, list[dict[str, Any]]] = {
    "text": [
        {"type": "word_replacement", "lexicon": "words.txt", "share": 1.0},
        {"type": "keyboard_typos", "share": 0.5},
        {"type": "character_noise", "share": 0.5},
        {"type": "word_dropout", "share": 0.3, "placeholder": "[MASK]"},
    ],
    "tags": [{"type": "mention_replacement"}, {"type": "word_dropout"}],
    "spans": [{"type": "sentence_shuffling"}, {"type": "punctuation_insertion"}],
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny recipe of three tasks, all of them augmented."""
    folder = tmp_path_factory.mktemp("loading")
    path = write_recipe(folder)
    (folder / "words.txt").write_text("program, love\nwrote => did\n")
    content = yaml.safe_load(path.read_text())
    for task in content["tasks"]:
        task["augmentation"] = AUGMENTATION[task["name"]]
    path.write_text(yaml.safe_dump(content))
    return path


def opened(path: Path, *overrides: str) -> tuple[Recipe, list[PreparedTask], StepPlan]:
    loaded = load_recipe(path, overrides=overrides)
    tokenizer = load_tokenizer(model_source(loaded.model))
    tasks = prepare_tasks(loaded, tokenizer=tokenizer, say=lambda _: None)
    return loaded, tasks, plan_steps(loaded, tasks)


def loader_of(path: Path, *overrides: str, rank: int = 0, world_size: int = 1) -> StepLoader:
    loaded, tasks, plan = opened(path, *overrides)
    tokenizer = load_tokenizer(model_source(loaded.model))
    loader = make_loader(
        loaded, tasks, tokenizer=tokenizer, mixture=plan.mixture, rank=rank, world_size=world_size
    )
    assert isinstance(loader, StepLoader)
    return loader


def test_fixed_weights_go_by_name(recipe: Path) -> None:
    weights = "mixture={policy: fixed, weights: {tags: 1, text: 6, spans: 1}}"
    plan = opened(recipe, weights, "train.max_duration=800step")[2]
    assert plan.mixture.steps_before(plan.total_steps) == pytest.approx((600, 100, 100), abs=8)


@pytest.mark.parametrize("duration", ["800step", "20ep", "40000tok"])
@pytest.mark.parametrize(
    "mixture",
    [
        "{policy: temperature, temperature: 4}",
        "{policy: examples_proportional, cap: 50}",
        "{policy: annealed, start: 1, end: 0.1}",
        "{policy: unimax, max_epochs: 3}",
        "{policy: fixed, weights: {tags: 5, text: 1, spans: 1}}",
    ],
)
def test_lengths_agree_with_the_shares(recipe: Path, mixture: str, duration: str) -> None:
    loaded, tasks, plan = opened(recipe, f"mixture={mixture}", f"train.max_duration={duration}")
    assert plan.total_steps == plan.lengths.steps(loaded.train.max_duration)
    counts = plan.mixture.steps_before(plan.total_steps)
    means = [t.datasets["train"].lengths.mean() for t in tasks]
    size = loaded.train.global_batch_size
    tokens = size * sum(c * m for c, m in zip(counts, means, strict=True)) / plan.total_steps
    assert plan.lengths.tokens == pytest.approx(tokens, rel=2e-3)
    options = plan.mixture.state().get("options", {})
    assert isinstance(options, dict)
    assert options.get("total_steps", plan.total_steps) == plan.total_steps
    assert options.get("total_rows", plan.total_steps * size) == plan.total_steps * size


def test_the_layout_changes_micro_batches_but_not_the_rows(recipe: Path) -> None:
    padded = {}
    for layout in ("in_order", "by_length"):
        loader = loader_of(recipe, f"train.layout={layout}")
        batches = [loader.batch(step) for step in range(24)]
        rows = [sorted(np.concatenate([m.rows for m in b.micro_batches])) for b in batches]
        assert rows == [sorted(loader.rows_of(step).rows) for step in range(24)]
        # Augmented inputs differ in length; the masks say what the layout is for.
        masks = [m.inputs["attention_mask"] for b in batches for m in b.micro_batches]
        padded[layout] = sum(mask.numel() for mask in masks)
    assert padded["by_length"] < padded["in_order"]


def test_only_augmented_training_rows_are_kept(recipe: Path, tmp_path: Path) -> None:
    _, tasks, _ = opened(recipe)
    for task in tasks:
        assert RAW_COLUMN in task.datasets["train"].manifest.schema.names
        assert RAW_COLUMN not in task.datasets["validation"].manifest.schema.names
    _, (plain, *_), _ = opened(recipe, "tasks.text.augmentation=[]", f"data_dir={tmp_path}")
    assert RAW_COLUMN not in plain.datasets["train"].manifest.schema.names


def test_rows_are_augmented_the_same_on_every_number_of_ranks(recipe: Path) -> None:
    alone = loader_of(recipe)
    pair = [loader_of(recipe, rank=rank, world_size=2) for rank in range(2)]
    plain = StepLoader(
        alone._datasets, specs=alone._specs, plan=alone._plan, mixture=alone._mixture
    )
    changed: set[str] = set()
    for step in range(12):
        batch = alone.batch(step)
        halves = [m for loader in pair for m in loader.batch(step).micro_batches]
        by_index = {m.index: m for m in halves}
        for micro, before in zip(batch.micro_batches, plain.batch(step).micro_batches, strict=True):
            ids, other = micro.inputs["input_ids"], by_index[micro.index].inputs["input_ids"]
            assert ids.equal(other)
            if not ids.equal(before.inputs["input_ids"]):
                changed.add(batch.task)
        assert batch.augmentation is not None
        assert batch.augmentation.samples > 0
    assert changed == {"text", "tags", "spans"}


def test_processes_make_the_same_data(recipe: Path, tmp_path: Path) -> None:
    _, one, _ = opened(recipe)
    _, two, _ = opened(recipe, "data_processes=2", f"data_dir={tmp_path}")
    for left, right in zip(one, two, strict=True):
        ids = [t.datasets["train"].manifest.dataset_id for t in (left, right)]
        assert ids[0] == ids[1]


def test_which_names_the_rows_of_the_loader(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "which", str(recipe), "--step", "22"]) == 0
    lines = capsys.readouterr().out.splitlines()
    used = loader_of(recipe).rows_of(22)
    assert lines[0] == f"step 22 of 24: task {used.task}, 8 rows"
    rows = [line.partition(", rows: ")[2].split() for line in lines if ", rows: " in line]
    assert sorted(row for part in rows for row in part) == sorted(map(str, used.rows))
    assert cli.main(["data", "which", str(recipe), "--step", "24"]) == 2
    assert "--step: the run has the steps 0 to 23, got 24" in capsys.readouterr().err


def test_stats_count_what_is_there(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, tasks, _ = opened(recipe)
    assert cli.main(["data", "stats", str(recipe)]) == 0
    out = capsys.readouterr().out
    for task in tasks:
        for split, dataset in task.datasets.items():
            start = f"{task.task.name}/{split}: {len(dataset):,} rows, "

            assert f"{start}{int(dataset.lengths.sum()):,} tokens" in out
    assert "truncated: " in out
    assert cli.main(["data", "stats", str(recipe), "data_dir=absent"]) == 2
    assert "holds no prepared data: run dist-ft prepare" in capsys.readouterr().err


def test_show_prints_before_and_after(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "show", str(recipe), "--task", "text"]
    assert cli.main([*words, "-n", "3"]) == 0
    assert capsys.readouterr().out.count(" tokens:\n") == 3
    assert cli.main([*words, "--augmented"]) == 0
    first = capsys.readouterr().out
    assert first.count(" of the source: ") == 5
    assert first.count("  text before: ") == first.count("  text after: ") >= 3
    texts = [line.partition("before: ")[2] for line in first.splitlines() if "before: " in line]
    raw = [json.loads(line)["text"] for line in (recipe.parent / "texts.jsonl").open()]
    assert {json.loads(text) for text in texts} <= set(raw)
    assert cli.main([*words, "--augmented", "--epoch", "1"]) == 0
    assert capsys.readouterr().out != first
    assert cli.main(["data", "show", str(recipe), "--task", "txt"]) == 2
    assert "use one of text, tags, spans" in capsys.readouterr().err


def test_verify_finds_a_flipped_byte(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = f"data_dir={tmp_path}"
    opened(recipe, where)
    assert cli.main(["data", "verify", str(recipe), where]) == 0
    assert capsys.readouterr().out.count(": intact\n") == 6
    shard = next((tmp_path / "tags" / "train").glob("shard-*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert cli.main(["data", "verify", str(recipe), where]) == 2
    out, err = capsys.readouterr()
    assert out.count(": intact\n") == 5
    assert err.startswith("tags/train: ")
    assert shard.name in err


def test_a_token_that_the_model_does_not_know_is_refused(recipe: Path, tmp_path: Path) -> None:
    """A tokenizer that has grown beyond the model's embeddings."""
    loaded, tasks, _ = opened(recipe)
    largest = max(d.manifest.max_token_id for t in tasks for d in t.datasets.values())
    config = BertConfig(
        vocab_size=largest,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    place = rf"task \w+, \w+: .*shard-\d+.*arrow, row \d+ of the data, holds token id {largest}"
    with pytest.raises(ValueError, match=place):
        check_vocabulary(tasks, model=BertModel(config))
    # It is asked before anything trains.
    model = Path(shutil.copytree(loaded.model.path, tmp_path / "model"))
    BertModel(config).save_pretrained(model)
    with pytest.raises(ValueError, match=place):
        make_parts(load_recipe(recipe, overrides=[f"model.path={model}"]), say=lambda _: None)
    config.vocab_size = largest + 1
    check_vocabulary(tasks, model=BertModel(config))
