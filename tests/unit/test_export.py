import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dist_ft.data.loader import MicroBatch
from dist_ft.model.backbone import HeadSpec, MultiTaskModel, build_model
from dist_ft.tasks.answer_spans import score_answers
from dist_ft.tasks.base import Task
from dist_ft.tasks.generation import Generation
from dist_ft.tasks.question_answering import QuestionAnswering
from dist_ft.tasks.text_classification import TextClassification
from dist_ft.tasks.token_classification import TokenClassification
from dist_ft.train.export import export_task
from dist_ft.train.model_card import adapter_card, model_card
from tests.helpers.batches import prepared, records
from tests.helpers.tiny_models import tiny_config
from tests.helpers.tiny_tokenizers import byte_level, wordpiece

CONTEXT = "It did it. " + "the program " * 12 + "Ada Lovelace wrote it in love."
QUESTION = "who wrote it?"
TEXT = "Ada wrote it in London"
READER = QuestionAnswering(name="qa", max_length=24, doc_stride=6, max_answer_length=7)
CARD = {
    "metrics": {"accuracy": 0.5},
    "recipe": {
        "model": {"path": "some/model"},
        "tasks": [
            {"name": "qa", "max_length": 24, "doc_stride": 6, "max_answer_length": 7},
            {"name": "causal_qa", "max_length": 48, "doc_stride": 6, "max_answer_length": 7},
        ],
    },
    "training_data": "rows made for a test",
}
# A process that cannot import dist_ft loads every folder and writes what it sees.
SCRIPT = """
import json, sys
sys.modules["dist_ft"] = None
import torch, transformers
jobs, found = json.loads(sys.argv[1]), {}
for name, job in jobs.items():
    model = getattr(transformers, job["auto_class"]).from_pretrained(job["folder"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["folder"])
    with torch.no_grad():
        out = model(**{k: torch.tensor(v) for k, v in job["inputs"].items()})
    keys = [k for k in ("logits", "start_logits", "end_logits") if k in out]
    custom = {"trust_remote_code": True} if job["custom"] else {}
    pipe = transformers.pipeline(job["pipeline"], model=job["folder"], **custom)
    said = pipe(*job["args"], **job["kwargs"])
    found[name] = {
        "logits": {k: out[k].tolist() for k in keys}, "pipe": said,
        "tokens": tokenizer(job["text"])["input_ids"],
        "labels": getattr(model.config, "id2label", None),
    }
print("FOUND" + json.dumps(found, default=float))
"""


@dataclass
class Exported:
    """An exported task and what the clean process says about it."""

    task: Task
    model: MultiTaskModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    inputs: dict[str, torch.Tensor]
    found: dict[str, Any]


def build(name: str, tasks: list[Any], tokenizer: PreTrainedTokenizerBase) -> MultiTaskModel:
    config = tiny_config(name)
    config.vocab_size = len(tokenizer)
    if name == "t5":  # transformers' cache is sized by the encoder's layers, so as many in both
        config.num_layers = config.num_decoder_layers
    heads = [HeadSpec(t.name, t.auto_class, t.config_updates()) for t in tasks]
    return build_model(config, heads=heads, dtype=torch.float32, seed=1)


CASES: list[tuple[str, list[Any]]] = [
    (
        "bert",
        [
            TextClassification(name="cls", labels=["fact", "question"]),
            TextClassification(name="multi", problem="multi_label", labels=["x", "y", "z"]),
            TextClassification(name="score", problem="regression"),
            TokenClassification(name="ner", labels=["O", "B-PER", "I-PER"]),
            READER,
        ],
    ),
    (
        "llama",
        [
            Generation(name="causal"),
            TextClassification(name="decoder_cls", labels=["a", "b", "c"]),
        ],
    ),
    (
        "gpt2",
        [
            Generation(name="tied"),
            QuestionAnswering(name="causal_qa", max_length=48, doc_stride=6, max_answer_length=7),
        ],
    ),
    ("t5", [Generation(name="pair", style="seq2seq")]),
]
PIPELINES = {
    "text_classification": "text-classification",
    "token_classification": "token-classification",
    "question_answering": "question-answering",
    "generation": "text-generation",
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    root = tmp_path_factory.mktemp("exports")
    done: dict[str, Exported] = {}
    jobs: dict[str, Any] = {}
    for architecture, tasks in CASES:
        tokenizer = byte_level() if architecture in ("llama", "gpt2") else wordpiece()
        model = build(architecture, tasks, tokenizer)
        for task in tasks:
            folder = export_task(
                model, tokenizer, task=task.name, folder=root / task.name, card=CARD
            )
            inputs = dict(tokenizer([TEXT, "it did"], padding=True, return_tensors="pt"))
            if architecture != "bert":
                inputs.pop("token_type_ids", None)
            if task.name == "pair":
                inputs["decoder_input_ids"] = torch.tensor([[0, 7, 8], [0, 9, 3]])
            done[task.name] = Exported(task, model, tokenizer, folder, inputs, {})
            jobs[task.name] = job(task, folder, inputs)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "hf"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(jobs)],
        cwd=root, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.partition("FOUND")[2])
    for name, item in done.items():
        item.found = found[name]
    return done


def job(task: Any, folder: Path, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    pair = task.name == "pair"
    qa = task.type == "question_answering"
    return {
        "auto_class": task.auto_class,
        "folder": str(folder),
        "inputs": {key: value.tolist() for key, value in inputs.items()},
        "pipeline": "text2text-generation" if pair else PIPELINES[task.type],
        "custom": pair or qa,
        "args": [] if qa else [TEXT],
        "kwargs": {"question": QUESTION, "context": CONTEXT} if qa else (
            {"max_new_tokens": 4} if task.type == "generation" else {}
        ),
        "text": TEXT,
    }  # fmt: skip


NAMES = [task.name for _, tasks in CASES for task in tasks]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_model_in_training(
    exported: dict[str, Exported], name: str
) -> None:
    item = exported[name]
    with torch.no_grad():
        expected = item.model(name, item.inputs)
    assert item.found["logits"]
    for key, values in item.found["logits"].items():
        difference = (torch.tensor(values) - expected[key]).abs().max()
        assert difference < 1e-5, key


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_is_the_same(exported: dict[str, Exported], name: str) -> None:
    item = exported[name]
    assert item.found["tokens"] == item.tokenizer(TEXT)["input_ids"]


def test_classification_pipeline_names_the_label(exported: dict[str, Exported]) -> None:
    item = exported["cls"]
    with torch.no_grad():
        probabilities = item.model("cls", dict(item.tokenizer([TEXT], return_tensors="pt")))[
            "logits"
        ].softmax(1)[0]
    (said,) = item.found["pipe"]
    assert said["label"] == ["fact", "question"][int(probabilities.argmax())]
    assert said["score"] == pytest.approx(float(probabilities.max()), abs=1e-5)


def test_regression_pipeline_gives_the_number(exported: dict[str, Exported]) -> None:
    item = exported["score"]
    inputs = dict(item.tokenizer([TEXT], return_tensors="pt"))
    with torch.no_grad():
        expected = float(item.model("score", inputs)["logits"][0, 0])
    assert item.found["pipe"][0]["score"] == pytest.approx(expected, abs=1e-5)


def test_token_pipeline_agrees_with_evaluation(
    exported: dict[str, Exported], tmp_path: Path
) -> None:
    item = exported["ner"]
    row = {"tokens": TEXT.split(), "tags": ["O"] * 5}
    data = prepared(item.task, [row], tokenizer=item.tokenizer, folder=tmp_path)
    (record,) = records(item.task, data, forward=forward(item), tokenizer=item.tokenizer)
    labels = ["O", "B-PER", "I-PER"]
    starts = [TEXT.index(word) for word in TEXT.split()]
    said = {entity["start"]: entity["entity"] for entity in item.found["pipe"]}
    for start, predicted in zip(starts, record["prediction"], strict=True):
        # the pipeline leaves out O, and does not turn a loose I- to B-
        assert said.get(start, "O")[2:] == labels[predicted][2:]


def forward(item: Exported) -> Any:
    @torch.no_grad()
    def run(batch: MicroBatch) -> Any:
        return item.model(item.task.name, batch.inputs)

    return run


def test_question_answering_pipeline_agrees_with_evaluation(
    exported: dict[str, Exported], tmp_path: Path
) -> None:
    item = exported["qa"]
    row = {"question": QUESTION, "context": CONTEXT, "answers": None, "id": "1"}
    data = prepared(item.task, [row], tokenizer=item.tokenizer, folder=tmp_path)
    assert len(data) > 2
    windows = records(item.task, data, forward=forward(item), tokenizer=item.tokenizer)
    best = max(windows, key=lambda record: record["score"])
    null = min(record["null_score"] for record in windows)
    said = item.found["pipe"]
    assert said["answer"] == (best["text"] if best["score"] > null else "")
    assert said["answer"] == CONTEXT[said["start"] : said["end"]]
    assert score_answers(windows)["answered"] == float(bool(said["answer"]))
    spread = torch.tensor([best["score"], null]).softmax(0)
    assert said["score"] == pytest.approx(float(spread.max()), abs=1e-5)


def test_generation_pipelines_continue_and_translate(exported: dict[str, Exported]) -> None:
    assert exported["causal"].found["pipe"][0]["generated_text"].startswith(TEXT)
    assert isinstance(exported["pair"].found["pipe"]["generated_text"], str)


def test_folder_has_only_what_the_task_needs(exported: dict[str, Exported]) -> None:
    names = {path.name for path in exported["ner"].folder.iterdir()}
    assert names == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    # the shared backbone has a pooler for another task's sake
    assert not any(
        "pooler" in key for key in load_file(exported["ner"].folder / "model.safetensors")
    )
    assert any("pooler" in key for key in load_file(exported["cls"].folder / "model.safetensors"))
    tied = load_file(exported["tied"].folder / "model.safetensors")
    assert "lm_head.weight" not in tied
    config = json.loads((exported["ner"].folder / "config.json").read_text())
    assert config["id2label"] == {"0": "O", "1": "B-PER", "2": "I-PER"}


def test_others_may_read_the_folder_if_the_umask_lets_them(
    exported: dict[str, Exported], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    usual = {(tmp_path / name).stat().st_mode for name in ("file", "folder")}
    folder = exported["ner"].folder
    assert {path.stat().st_mode for path in (folder, *folder.iterdir())} == usual


def test_model_card_has_metrics_labels_recipe_and_usage(exported: dict[str, Exported]) -> None:
    card = (exported["qa"].folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "question-answering"
    assert "| accuracy | 0.5000 |" in card
    assert "`some/model`" in card
    assert "trust_remote_code=True" in card
    assert "## Training data\n\nrows made for a test" in card
    recipe = card.partition("## Recipe")[2].partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(recipe) == CARD["recipe"]
    labels = (exported["ner"].folder / "README.md").read_text().partition("## Labels")[2]
    assert "0. O\n1. B-PER\n2. I-PER" in labels


def test_a_card_names_no_folder_of_this_machine() -> None:
    recipe = {"model": {"path": "/home/ada/models/bert"}, "output_dir": "/home/ada/runs",
              "tasks": [{"text": "text", "data": {"train": {"path": "/home/ada/data/rows.csv"}}},
                        {"separator": "/", "data": {"train": {"path": "org/set"}}}]}  # fmt: skip
    for card in (
        model_card(task="t", auto_class="AutoModelForSequenceClassification", labels=["a", "b"],
                   card={"recipe": recipe}),
        adapter_card(task="t", labels=["a", "b"], card={"recipe": recipe}),
    ):  # fmt: skip
        assert "/home" not in card
        assert "`bert`" in card
        shown = yaml.safe_load(
            card.partition("## Recipe")[2].partition("```yaml\n")[2].partition("```")[0]
        )
        assert shown["tasks"][0]["data"]["train"]["path"] == "rows.csv"
        assert shown["tasks"][1] == recipe["tasks"][1]


def test_an_exported_model_ends_its_answers_as_it_was_taught(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}"
    task = Generation(name="talk", chat=True)
    model = build("llama", [task], tokenizer)
    card = {"recipe": {"tasks": [{"name": "talk", "chat": True}]}}
    with model.task_model("talk") as task_model:
        before: Any = task_model.generation_config.eos_token_id
    folder = export_task(model, tokenizer, task="talk", folder=tmp_path / "talk", card=card)
    found: Any = GenerationConfig.from_pretrained(folder).eos_token_id
    taught: Any = tokenizer.convert_tokens_to_ids(["<eos>", "<|im_end|>"])
    assert found == sorted({*taught} if before is None else {*taught, before})
    with model.task_model("talk") as task_model:
        assert task_model.generation_config.eos_token_id == before


@pytest.fixture
def tagger() -> tuple[MultiTaskModel, PreTrainedTokenizerBase]:
    task = TokenClassification(name="ner", labels=["O", "B-PER", "I-PER"])
    tokenizer = wordpiece()
    return build("bert", [task], tokenizer), tokenizer


def test_existing_folder_is_refused_and_left_alone(
    tagger: tuple[MultiTaskModel, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine").write_text("")
    with pytest.raises(ValueError, match="exists already: remove it"):
        export_task(*tagger, task="ner", folder=folder, card={})
    assert [path.name for path in folder.iterdir()] == ["mine"]


def test_failure_leaves_nothing(
    tagger: tuple[MultiTaskModel, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    model, tokenizer = tagger
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"lack backbone\."):
        export_task(
            model, tokenizer, task="ner", folder=tmp_path / "a" / "out", card={}, weights={}
        )
    assert not list((tmp_path / "a").iterdir())
    assert [name for name, _ in model.named_modules()] == before


def test_unknown_task_is_an_error(
    tagger: tuple[MultiTaskModel, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="no task 'x', only ner"):
        export_task(*tagger, task="x", folder=tmp_path / "out", card={})


def test_gathered_weights_are_written_in_place_of_the_models_own(
    tagger: tuple[MultiTaskModel, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    model, tokenizer = tagger
    weights = {name: p.detach() + 1 for name, p in model.named_parameters()}
    for parameter in model.parameters():  # as if partitioned
        parameter.data = torch.empty(0)
    folder = export_task(
        model, tokenizer, task="ner", folder=tmp_path / "out", card={}, weights=weights
    )
    written = load_file(folder / "model.safetensors")
    assert torch.equal(written["classifier.bias"], weights["heads.ner.classifier.bias"])
    key = "embeddings.word_embeddings.weight"
    assert torch.equal(written[f"bert.{key}"], weights[f"backbone.{key}"])


def test_model_can_go_on_training_after_export(
    tagger: tuple[MultiTaskModel, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    model, tokenizer = tagger
    config = json.dumps(model.heads["ner"].config.to_dict(), default=str)  # type: ignore[operator]
    before = [name for name, _ in model.named_parameters()]
    export_task(model, tokenizer, task="ner", folder=tmp_path / "out", card={})
    assert [name for name, _ in model.named_parameters()] == before
    model("ner", dict(tokenizer([TEXT], return_tensors="pt")))["logits"].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    after: Any = model.heads["ner"].config
    assert set(json.loads(config)) <= set(after.to_dict())
    assert not hasattr(after, "custom_pipelines")
