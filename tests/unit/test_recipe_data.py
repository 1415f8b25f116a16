"""Mixture, augmentation and layout in a recipe: what is read, and what is refused how."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_ft.config import CasingConfig, Recipe, RoundRobinMixture, WordReplacementConfig
from dist_ft.config_data import DataConfig, SourceConfig
from dist_ft.config_tasks import GenerationConfig
from dist_ft.recipe import RecipeError, load_recipe
from dist_ft.recipe.ranks import check_ranks
from dist_ft.train.augmentation import make_augmenter
from dist_ft.train.data import raw_columns
from tests.unit.test_recipe import folder as folder_of_test_recipe

folder = folder_of_test_recipe


def errors_of(recipe: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides=overrides)
    return caught.value.errors


@pytest.mark.parametrize(
    "mixture",
    [
        {"policy": "round_robin"},
        {"policy": "examples_proportional", "cap": 100},
        {"policy": "temperature", "temperature": 3.0, "cap": None},
        {"policy": "annealed", "start": 1.0, "end": 0.5, "cap": 5},
        {"policy": "fixed", "weights": {"topics": 1.0, "spans": 2.0}},
        {"policy": "unimax", "max_epochs": 2.0},
        {"policy": "bandit", "reward": "gain", "every": 16, "rate": 1.0, "smoothing": 0.0},
    ],
)
def test_mixtures_are_read_and_kept(folder: Path, mixture: dict[str, object]) -> None:
    mixture = {**mixture, "tasks_per_step": 2 if mixture["policy"] != "bandit" else 1}
    overrides = [f"mixture={json.dumps(mixture)}", "evaluation.every=1step"]
    recipe = load_recipe(folder / "demo.yaml", overrides=overrides)
    assert recipe.mixture.model_dump() == mixture
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_tasks_take_turns_without_a_policy(folder: Path) -> None:
    assert load_recipe(folder / "demo.yaml").mixture == RoundRobinMixture()
    assert load_recipe(folder / "demo.yaml", overrides=["mixture={}"]).mixture.policy == (
        "round_robin"
    )


def test_a_lexicon_starts_from_the_recipe(folder: Path) -> None:
    (folder / "words.txt").write_text("quick, fast\n")
    item = "{type: word_replacement, lexicon: words.txt, share: 0.5}"
    packaged = "{type: word_replacement, lexicon: 'package:wordnet'}"
    recipe = load_recipe(
        folder / "demo.yaml", overrides=[f"tasks.topics.augmentation=[{item}, {packaged}]"]
    )
    first, second = recipe.tasks[0].augmentation
    assert isinstance(first, WordReplacementConfig)
    assert isinstance(second, WordReplacementConfig)
    assert (first.lexicon, second.lexicon) == (str(folder / "words.txt"), "package:wordnet")
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_chinese_words_are_those_of_the_recipe(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jieba = "tasks.topics.segmentation=jieba"
    casing = "tasks.topics.augmentation=[{type: casing}]"
    recipe = load_recipe(folder / "demo.yaml", overrides=[jieba, casing])
    config = recipe.tasks[0]
    task: Any = None
    made = make_augmenter(config.augmentation, config=config, task=task, dataset=task)
    assert made.describe()["segmentation"] == "jieba"
    assert "segmentation" not in config.arguments()
    with pytest.raises(RecipeError, match=r"topics\.segmentation: is what augmentation takes"):
        load_recipe(folder / "demo.yaml", overrides=[jieba])
    monkeypatch.setattr("dist_ft.recipe.augmentation_checks.find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=r"not installed, got 'jieba': .*dist-ft\[chinese\]"):
        load_recipe(folder / "demo.yaml", overrides=[jieba, casing])


def test_augmented_rows_keep_all_that_encoding_reads() -> None:
    config = GenerationConfig(
        type="generation",
        name="x",
        data=DataConfig(train=SourceConfig(path="x.jsonl")),
        context="input",
        augmentation=[CasingConfig(type="casing")],
    )
    assert raw_columns(config) == ("prompt", "input", "response")
    assert raw_columns(config.model_copy(update={"augmentation": []})) == ()


def test_a_budget_of_tokens_does_without_a_count(folder: Path) -> None:
    short = "train={max_duration: 5step, global_batch_size: 32, micro_batch_tokens: 512}"
    recipe = load_recipe(folder / "demo.yaml", overrides=[short])
    assert (recipe.train.micro_batch_tokens, recipe.train.micro_batch_size) == (512, 32)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    check_ranks(recipe, 5)
    with pytest.raises(ValueError, match="32 rows are too few for 33 ranks"):
        check_ranks(recipe, 33)
    neither = "train={max_duration: 5step, global_batch_size: 32}"
    assert errors_of(folder / "demo.yaml", neither) == [
        "train.micro_batch_size: required, got nothing: add micro_batch_size (a whole number)"
    ]
    config = {"train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 2}
    (folder / "ds.json").write_text(json.dumps({**config, "train_batch_size": 32}))
    assert errors_of(folder / "demo.yaml", short, "engine.deepspeed=ds.json") == [
        "engine.deepspeed: ds.json: train_micro_batch_size_per_gpu must agree with "
        "train.micro_batch_tokens ('512 tokens'), got 16: remove train_micro_batch_size_per_gpu "
        "from the file",
        "engine.deepspeed: ds.json: gradient_accumulation_steps differs from step to step with "
        "train.micro_batch_tokens, got 2: remove it from the file",
    ]


# Each row: overrides of a good recipe, the lines that must come out, whole.
GOLDEN: dict[str, tuple[list[str], list[str]]] = {
    "budget without a layout": (
        ["train.micro_batch_tokens=512", "train.layout=in_order"],
        ["train.micro_batch_tokens: needs layout by_length or packed, got in_order: change one"],
    ),
    "empty budget": (
        ["train.micro_batch_tokens=0"],
        ["train.micro_batch_tokens: must be greater than 0, got 0: raise it"],
    ),
    "policy": (
        ["mixture.policy=temprature"],
        [
            "mixture.policy: must be one of round_robin, examples_proportional, temperature, "
            "annealed, fixed, unimax, bandit, got 'temprature': did you mean temperature?"
        ],
    ),
    "key of another policy": (
        ["mixture={policy: fixed, weights: {topics: 1, spans: 1}, cap: 3}"],
        ["mixture.cap: unknown key, got 3: move it to mixture.cap"],
    ),
    "no weights": (
        ["mixture={policy: fixed}"],
        ["mixture.weights: required, got nothing: add weights (a section of `key: value` lines)"],
    ),
    "weights": (
        ["mixture={policy: fixed, weights: {topcs: 1}}"],
        [
            "mixture.weights.topcs: must be the name of a task: did you mean topics?",
            "mixture.weights: must name every task, got none for topics, spans: add them",
        ],
    ),
    "a weight of nothing": (
        ["mixture={policy: fixed, weights: {topics: 0, spans: 1}}"],
        ["mixture.weights.topics: must be greater than 0, got 0: raise it"],
    ),
    "layout": (
        ["train.layout=by_lenght"],
        [
            "train.layout: must be one of in_order, by_length, packed, got 'by_lenght': did you "
            "mean by_length?"
        ],
    ),
    "transform": (
        ["tasks.topics.augmentation=[{type: casng}]"],
        [
            "tasks.topics.augmentation[0].type: must be one of sentence_shuffling, "
            "word_replacement, keyboard_typos, character_noise, casing, punctuation_insertion, "
            "word_dropout, mention_replacement, got 'casng': did you mean casing?"
        ],
    ),
    "share": (
        ["tasks.topics.augmentation=[{type: casing, share: 1.5}]"],
        ["tasks.topics.augmentation[0].share: must be at most 1, got 1.5: lower it"],
    ),
    "mentions of no entities": (
        ["tasks.topics.augmentation=[{type: mention_replacement}]"],
        [
            "tasks.topics.augmentation[0].type: mention_replacement needs the tags of a "
            "token_classification, got 'text_classification': remove it"
        ],
    ),
    "missing lexicon": (
        ["tasks.topics.augmentation=[{type: word_replacement, lexicon: absent.txt}]"],
        [
            "tasks.topics.augmentation[0].lexicon: no such file or folder, got "
            "'{folder}/absent.txt': correct the path"
        ],
    ),
    "packaged lexicon": (
        ["tasks.topics.augmentation=[{type: word_replacement, lexicon: 'package:wordnt'}]"],
        [
            "tasks.topics.augmentation[0].lexicon: must be a file, a folder, package:misspellings "
            "or package:wordnet, got 'package:wordnt': did you mean package:wordnet?"
        ],
    ),
    "blank placeholder": (
        ["tasks.topics.augmentation=[{type: word_dropout, placeholder: ' '}]"],
        ["tasks.topics.augmentation[0].placeholder: must not be blank, got ' ': leave it out"],
    ),
    "versions of nothing": (
        ["cache.variants=4"],
        [
            "cache.variants: repeats the augmentation, and no task has one, got 4: remove it, or "
            "augment a task"
        ],
    ),
    "processes": (
        ["data_processes=0"],
        ["data_processes: must be greater than 0, got 0: raise it"],
    ),
}


@pytest.mark.parametrize(("overrides", "lines"), GOLDEN.values(), ids=GOLDEN)
def test_messages(folder: Path, overrides: list[str], lines: list[str]) -> None:
    expected = [line.replace("{folder}", str(folder)) for line in lines]
    assert sorted(errors_of(folder / "demo.yaml", *overrides)) == sorted(expected)
