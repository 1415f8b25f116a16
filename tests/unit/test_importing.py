"""Configurations of other trainers become recipes; nothing is dropped without a word."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft import cli
from dist_ft.importing.run import KINDS, import_recipe
from dist_ft.importing.trainers import from_trainer
from dist_ft.recipe import load_recipe

AXOLOTL = """
base_model: Qwen/Qwen2.5-0.5B
datasets:
  - {path: tatsu-lab/alpaca, type: alpaca, split: train}
val_set_size: 0.05
sequence_len: 1024
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-5
warmup_ratio: 0.1
bf16: true
gradient_checkpointing: true
flash_attention: true
saves_per_epoch: 2
adapter: lora
lora_r: 16
deepspeed: deepspeed_configs/zero3.json
special_tokens: {pad_token: <|endoftext|>}
output_dir: ./outputs/my run
"""
LLAMA_FACTORY = """
model_name_or_path: meta-llama/Llama-3.2-1B
stage: sft
finetuning_type: full
use_badam: true
badam_mode: layer
badam_switch_mode: ascending
badam_switch_interval: 50
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
output_dir: saves/llama3/full/sft
logging_steps: 10
save_steps: 500
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-5
max_steps: 1000
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.1
eval_strategy: steps
eval_steps: 500
"""


def _import(tmp_path: Path, text: str, *, kind: str, ranks: int = 1) -> tuple[dict[str, Any], str]:
    file = tmp_path / "theirs.yaml"
    file.write_text(text)
    found = import_recipe(file, kind=kind, ranks=ranks)
    return yaml.safe_load(found.text), "\n".join(found.notes)


def test_axolotl_becomes_a_recipe_that_loads(tmp_path: Path) -> None:
    (tmp_path / "deepspeed_configs").mkdir()
    zero = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    (tmp_path / "deepspeed_configs/zero3.json").write_text(json.dumps(zero))
    body, notes = _import(tmp_path, AXOLOTL, kind="axolotl", ranks=4)
    assert body["name"] == "my-run"
    assert body["train"] == {
        "max_duration": "3ep",
        "micro_batch_size": 2,
        "global_batch_size": 32,
    }
    assert body["optim"]["schedule"] == {"type": "cosine", "warmup": "0.3ep"}
    assert body["engine"] == {"precision": "bf16", "zero_stage": 3, "offload_optimizer": True}
    assert body["model"]["attention"] == "flash_attention_2"
    assert body["checkpoint"]["every"] == "0.5ep"
    for part in ("adapter = 'lora'", "lora_r = 16", "fp32 state is used, which needs more memory"):
        assert part in notes
    path = tmp_path / "ours.yaml"
    path.write_text(yaml.safe_dump(body))
    task = load_recipe(path).tasks[0]
    assert (task.max_length, task.data.validation) == (1024, 0.05)


def test_llama_factory_becomes_a_recipe_that_loads(tmp_path: Path) -> None:
    body, notes = _import(tmp_path, LLAMA_FACTORY, kind="llama-factory")
    assert body["freezing"] == {
        "policy": "random_block", "blocks": 1, "order": "ascending", "every": "50step",
    }  # fmt: skip
    assert body["train"]["max_duration"] == "1000step"
    assert body["optim"]["schedule"]["warmup"] == "100step"
    assert body["evaluation"]["every"] == "500step"
    assert [t["name"] for t in body["tasks"]] == ["chat", "chat2"]
    assert "names are LLaMA-Factory's own" in notes
    assert "for one rank" in notes
    path = tmp_path / "ours.yaml"
    path.write_text(yaml.safe_dump(body))
    assert load_recipe(path, needs_files=False).freezing.policy == "random_block"
    frozen = "model_name_or_path: meta-llama/Llama-3.2-1B\nfinetuning_type: freeze\n"
    body, _ = _import(tmp_path, frozen + "freeze_trainable_layers: 4\n", kind="llama-factory")
    assert body["freezing"] == {"policy": "static", "depth": 12}


def test_trainer_arguments_and_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = {
        "model_name_or_path": "google-bert/bert-base-uncased",
        "dataset_name": "nyu-mll/glue",
        "dataset_config_name": "sst2",
        "output_dir": "/somewhere/sst2",
        "per_device_train_batch_size": 32,
        "num_train_epochs": 2.5,
        "learning_rate": 3e-5,
        "fp16": True,
        "eval_strategy": "epoch",
        "save_total_limit": 3,
        "report_to": ["tensorboard", "neptune"],
        "label_smoothing_factor": 0.1,
        "lr_scheduler_type": "polynomial",
        "push_to_hub": False,
    }
    file, out = tmp_path / "args.json", tmp_path / "ours.yaml"
    file.write_text(json.dumps(theirs))
    words = ["import", "--from", "hf-trainer-args", str(file), "--ranks", "2", "--output", str(out)]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "not translated: label_smoothing_factor = 0.1" in said
    assert "learning-rate schedule 'polynomial': linear is used" in said
    recipe = load_recipe(out)
    assert recipe.train.global_batch_size == 64
    assert recipe.engine.precision == "fp16"
    assert recipe.logging.trackers == ["tensorboard"]
    assert "# - not translated: label_smoothing_factor" in out.read_text()
    assert cli.main(words) == 2  # never over a file that is there
    assert cli.main(["import", "--from", "trl", str(file)]) == 2
    assert "must be one of hf-trainer-args" in capsys.readouterr().err
    assert cli.main(["import", "--from", "axolotl", str(tmp_path / "absent")]) == 2
    file.write_text("[1, 2]")
    assert cli.main(["import", "--from", "axolotl", str(file)]) == 2
    assert "must hold `key: value` lines" in capsys.readouterr().err


def test_a_schedule_of_the_finetuning_scheduler(tmp_path: Path) -> None:
    schedule = {
        0: {"params": ["model.classifier.bias", "model.classifier.weight"],
            "max_transition_epoch": 1},
        1: {"params": [r"model.bert.encoder.layer.(10|11).*", "model.bert.pooler.dense.weight"],
            "max_transition_epoch": 3, "lr": 1e-6},
        2: {"params": [r"model.bert.encoder.layer\.9.output", "model.odd"]},
        3: {"params": ["model.bert.embeddings.word_embeddings.weight"]},
    }  # fmt: skip
    body, notes = _import(tmp_path, yaml.safe_dump(schedule), kind="finetuning-scheduler")
    phases = body["freezing"]["phases"]
    assert [p["at"] for p in phases] == ["0step", "1ep", "3ep", "4ep"]
    assert phases[1]["trainable"] == ["head.*", "block.10", "block.11", "pooler"]
    assert phases[3]["trainable"][-2:] == ["block.9", "embeddings"]
    assert "phase 2: 'model.odd' names no layer group" in notes
    assert "phase 2 ends by early stopping" in notes
    assert "phase 1: lr = 1e-06" in notes


KEYS = st.sampled_from(["learning_rate", "max_steps", "warmup_ratio", "seed", "lora_r", "bf16",
                        "deepspeed", "mystery", "num_train_epochs", "eval_steps"])  # fmt: skip


@given(st.dictionaries(KEYS, st.integers(1, 9), min_size=1))
@settings(deadline=None, max_examples=60)
def test_every_key_is_translated_or_named(source: dict[str, int]) -> None:
    from dist_ft.importing.draft import Draft

    draft = Draft(source, Path(), ranks=1)
    from_trainer(draft)
    draft.finish()
    text = "\n".join(draft.notes)
    for key in ("lora_r", "mystery"):
        assert (f"{key} = " in text) == (key in source)


_DATA = "datasets: [{path: org/set, type: alpaca}]\n"


def test_what_the_file_leaves_out_is_what_its_trainer_takes(tmp_path: Path) -> None:
    for kind, text in (
        ("hf-trainer-args", "output_dir: out\n"),
        ("llama-factory", "output_dir: out\n"),
    ):
        body, _ = _import(tmp_path, text, kind=kind)
        assert body["optim"]["lr"] == 5e-5
        assert body["optim"]["weight_decay"] == 0
        assert body["optim"]["schedule"] == {"type": "linear"}
        assert body["train"] == {
            "max_duration": "3ep", "micro_batch_size": 8, "global_batch_size": 8,
        }  # fmt: skip
        assert body["engine"]["precision"] == "fp32"
    body, notes = _import(tmp_path, "base_model: m\n" + _DATA, kind="axolotl")
    assert body["optim"]["lr"] == "FILL-IN"
    assert "fill in optim.lr" in notes
    assert body["optim"]["weight_decay"] == 0
    assert body["optim"]["schedule"] == {"type": "cosine", "warmup": "0.03ep"}
    assert "at most 100 steps" in notes
    assert body["train"]["max_duration"] == "1ep"
    assert body["train"]["micro_batch_size"] == 1
    assert body["engine"]["precision"] == "bf16"
    assert body["tasks"][0]["max_length"] == 512
    given = "weight_decay: 0.3\nlearning_rate: 1e-3\nadam_beta2: 0.95\nbf16: false\n"
    body, _ = _import(tmp_path, given + _DATA, kind="axolotl")
    assert (body["optim"]["weight_decay"], body["optim"]["lr"]) == (0.3, 1e-3)
    assert body["optim"]["betas"] == [0.9, 0.95]
    assert body["engine"]["precision"] == "fp32"


def test_a_share_of_warm_up_is_of_the_epochs_that_the_trainer_takes(tmp_path: Path) -> None:
    body, _ = _import(tmp_path, "warmup_ratio: 0.1\n" + _DATA, kind="axolotl")
    assert body["optim"]["schedule"]["warmup"] == "0.1ep"
    body, _ = _import(tmp_path, "warmup_ratio: 0.1\n", kind="llama-factory")
    assert body["optim"]["schedule"]["warmup"] == "0.3ep"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("warmup_steps: 0.1", {"type": "linear", "warmup": "0.3ep"}),
        ("warmup_steps: 0.1\nmax_steps: 15", {"type": "linear", "warmup": "2step"}),
        ("warmup_ratio: 0.1\nmax_steps: 15", {"type": "linear", "warmup": "2step"}),
        ("warmup_steps: 7", {"type": "linear", "warmup": "7step"}),
        ("warmup_steps: 7\nlr_scheduler_type: constant", {"type": "constant"}),
        ("warmup_ratio: 0.1\nlr_scheduler_type: constant", {"type": "constant"}),
        (
            "warmup_steps: 7\nlr_scheduler_type: constant_with_warmup",
            {"type": "constant", "warmup": "7step"},
        ),
    ],
)
def test_warm_up(tmp_path: Path, text: str, expected: dict[str, str]) -> None:
    body, _ = _import(tmp_path, text, kind="hf-trainer-args")
    assert body["optim"]["schedule"] == expected


def test_plain_text_and_unknown_formats_are_left_to_be_filled_in(tmp_path: Path) -> None:
    for kind in ("completion", "chat_template"):
        text = f"datasets: [{{path: org/set, type: {kind}}}]\n"
        body, notes = _import(tmp_path, text, kind="axolotl")
        [task] = body["tasks"]
        assert (task["prompt"], task["response"]) == ("FILL-IN", "FILL-IN")
        assert f"datasets[0].type {kind!r}" in notes
        assert ("no training on plain text" in notes) == (kind == "completion")


def test_llama_factory_trains_adapters_and_in_bf16(tmp_path: Path) -> None:
    body, notes = _import(tmp_path, "pure_bf16: true\n", kind="llama-factory")
    assert body["engine"]["precision"] == "bf16"
    assert "master weights are fp32" in notes
    assert "finetuning_type: the file says nothing, which is 'lora'" in notes
    for text in ("finetuning_type: full", "use_badam: true", "use_galore: true"):
        _, notes = _import(tmp_path, text, kind="llama-factory")
        assert "lora" not in notes
    _, notes = _import(tmp_path, "finetuning_type: lora", kind="llama-factory")
    assert "all weights train instead" in notes


def test_rows_that_are_withheld_are_noted(tmp_path: Path) -> None:
    for kind, text in (
        ("axolotl", _DATA),
        ("axolotl", "val_set_size: 0\n" + _DATA),
        ("llama-factory", "val_size: 500\n"),
        ("hf-trainer-args", "train_file: a.csv\n"),
    ):
        body, notes = _import(tmp_path, text, kind=kind)
        assert "validation" not in body["tasks"][0]["data"]
        assert "10 % of the training rows are withheld" in notes
    assert "500 rows" in _import(tmp_path, "val_size: 500\n", kind="llama-factory")[1]
    _, notes = _import(tmp_path, "val_set_size: 0.2\n" + _DATA, kind="axolotl")
    assert "withheld" not in notes


def test_intervals_may_be_shares_of_the_run(tmp_path: Path) -> None:
    text = "eval_strategy: steps\neval_steps: 0.1\nsave_steps: 0.5\nlogging_steps: 0.01\n"
    body, notes = _import(tmp_path, text, kind="hf-trainer-args")
    assert (body["evaluation"]["every"], body["checkpoint"]["every"]) == ("0.3ep", "1.5ep")
    assert "logging_steps = 0.01" in notes
    body, _ = _import(tmp_path, text + "max_steps: 505\n", kind="hf-trainer-args")
    assert (body["evaluation"]["every"], body["checkpoint"]["every"]) == ("51step", "253step")
    assert body["logging"]["every"] == 6
    body, _ = _import(tmp_path, "eval_strategy: no\neval_steps: 5\n", kind="hf-trainer-args")
    assert "evaluation" not in body


def test_every_key_of_a_data_set_is_translated_or_named(tmp_path: Path) -> None:
    text = """
datasets:
  - {path: json, data_files: x.jsonl, type: alpaca, ds_type: json, field: words}
  - {path: csv, data_files: [a.csv, b.csv], type: alpaca}
  - {path: org/set, data_files: part.jsonl, type: alpaca}
  - org/other
"""
    body, notes = _import(tmp_path, text, kind="axolotl")
    trains = [task["data"]["train"] for task in body["tasks"]]
    assert trains == ["x.jsonl", "FILL-IN", "org/set", "org/other"]
    for part in ("[0].ds_type = 'json'", "[0].field = 'words'", "[2].data_files = 'part.jsonl'",
                 "[1].data_files = ['a.csv', 'b.csv']", "longer responses are cut"):  # fmt: skip
        assert part in notes
    assert "[0].data_files" not in notes


def test_what_deepspeed_moves_to_other_memory_is_noted(tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    zero: dict[str, Any] = {"stage": 3, "offload_param": {"device": "cpu"}}
    zero["offload_optimizer"] = {"device": "nvme"}
    config.write_text(json.dumps({"zero_optimization": zero}))
    body, notes = _import(tmp_path, "deepspeed: ds.json", kind="hf-trainer-args")
    assert body["engine"] == {"precision": "fp32", "zero_stage": 3}
    assert "offload_param.device = 'cpu'" in notes
    assert "offload_optimizer.device = 'nvme'" in notes
    for zero_less in ({"train_batch_size": 8}, {"zero_optimization": {}}):
        config.write_text(json.dumps(zero_less))
        body, notes = _import(tmp_path, "deepspeed: ds.json", kind="hf-trainer-args", ranks=4)
        assert body["engine"]["zero_stage"] == 0
        assert "deepspeed" not in notes


def test_other_sections_of_deepspeed_are_noted(tmp_path: Path) -> None:
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}
    body = {"zero_optimization": {"stage": 2}, "scheduler": scheduler, "train_batch_size": 8}
    (tmp_path / "ds.json").write_text(json.dumps(body))
    _, notes = _import(tmp_path, "deepspeed: ds.json", kind="hf-trainer-args")
    assert "not translated: deepspeed.scheduler = {'type': 'WarmupLR'" in notes
    assert "train_batch_size" not in notes


def test_several_data_sets_come_as_often_as_their_rows(tmp_path: Path) -> None:
    text = "datasets: [{path: big, type: alpaca}, {path: small, type: alpaca}]\n"
    body, notes = _import(tmp_path, text, kind="axolotl")
    assert [t["name"] for t in body["tasks"]] == ["chat", "chat2"]
    assert body["mixture"] == {"policy": "examples_proportional"}
    assert "2 data sets are as many tasks here" in notes
    assert "mixture" not in _import(tmp_path, _DATA, kind="axolotl")[0]


ODD = [True, False, 0, -1, 0.5, 1e300, "auto", "", "a", [], [1], ["a"], {}, {"a": 1}, {"a": None},
       [[]], [{}], "\0", "x" * 5000, 10**400]  # fmt: skip
KEYS_OF = {
    "hf-trainer-args": "learning_rate weight_decay max_grad_norm adam_epsilon adam_beta1 optim "
    "lr_scheduler_type bf16 fp16 max_steps num_train_epochs warmup_steps warmup_ratio "
    "per_device_train_batch_size gradient_accumulation_steps eval_strategy save_strategy "
    "eval_steps save_steps save_total_limit logging_steps seed gradient_checkpointing "
    "trust_remote_code report_to deepspeed run_name output_dir model_name_or_path "
    "max_seq_length train_file dataset_config_name validation_file mystery",
    "axolotl": "learning_rate num_epochs micro_batch_size deepspeed base_model flash_attention "
    "sdp_attention special_tokens evals_per_epoch saves_per_epoch wandb_project adapter "
    "unfrozen_parameters sequence_len val_set_size datasets",
    "llama-factory": "pure_bf16 flash_attn stage finetuning_type freeze_trainable_layers "
    "badam_switch_interval badam_switch_mode use_badam use_galore cutoff_len val_size dataset "
    "template model_name_or_path",
    "finetuning-scheduler": "0 1 a",
}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_odd_values_are_refused_by_the_name_of_their_key(
    kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    odd = st.sampled_from(ODD)
    key, value = data.draw(st.sampled_from(KEYS_OF[kind].split())), data.draw(odd)
    if data.draw(st.booleans()):
        inner = "path type split name data_files pad_token params max_transition_epoch"
        value = {data.draw(st.sampled_from([*inner.split(), "zero_optimization"])): value}
        value = [value] if key == "datasets" else value
    file = tmp_path_factory.mktemp("odd") / "theirs.json"
    file.write_text(json.dumps({key: value}))
    try:
        found = import_recipe(file, kind=kind)
    except ValueError as error:
        assert key in str(error)  # noqa: PT017 - it may also be taken
    else:
        assert isinstance(yaml.safe_load(found.text), dict)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("axolotl", "special_tokens: [a]"),
        ("axolotl", "datasets: [3]"),
        ("axolotl", "datasets: {path: a}"),
        ("hf-trainer-args", "gradient_accumulation_steps: auto"),
        ("hf-trainer-args", "deepspeed: {zero_optimization: 3}"),
        ("finetuning-scheduler", "0: [a]"),
        ("finetuning-scheduler", "0: {params: a}"),
    ],
)
def test_values_of_another_type_are_refused(tmp_path: Path, kind: str, text: str) -> None:
    key = text.partition(":")[0]
    with pytest.raises(ValueError, match=f"{key}.*: must be .*, got .*: write"):
        _import(tmp_path, text, kind=kind)
