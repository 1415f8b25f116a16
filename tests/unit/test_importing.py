"""Configurations of other trainers become recipes; nothing is dropped without a word."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft import cli
from dist_ft.importing.run import import_recipe
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
