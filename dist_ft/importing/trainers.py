"""Translations from Transformers' ``Trainer``, Axolotl and LLaMA-Factory."""

from __future__ import annotations

from typing import Any

from dist_ft.importing.common import (
    run_name,
    take_attention,
    take_deepspeed,
    take_intervals,
    take_length,
    take_optimizer,
)
from dist_ft.importing.draft import Draft
from dist_ft.recipe.errors import TO_FILL
from dist_ft.recipe.model_folder import count_blocks

# Columns of the prompt formats that have plain ones.
_FORMATS = {
    "alpaca": {"prompt": "instruction", "context": "input", "response": "output"},
    "completion": {"prompt": "text", "response": "text"},
    "oasst": {"prompt": "INSTRUCTION", "response": "RESPONSE"},
}


def from_trainer(draft: Draft) -> None:
    """Translate ``TrainingArguments`` with the arguments of Transformers' example scripts."""
    take_length(draft, epochs="num_train_epochs")
    take_optimizer(draft)
    take_intervals(draft)
    take_deepspeed(draft)
    draft.put("name", run_name(draft.take("run_name", "output_dir"), default="imported"))
    draft.ignore("output_dir", "run_name")
    _model(draft, draft.take("model_name_or_path"))
    task: dict[str, Any] = {"name": "task", "type": "text_classification"}
    length = draft.take("max_seq_length", "max_length")
    if length is not None:
        task["max_length"] = int(length)
    train = draft.take("train_file", "dataset_name")
    if train is None:
        draft.note("TrainingArguments say nothing of data and task: complete `tasks`")
    task["data"] = {"train": _source(train, subset=draft.take("dataset_config_name"))}
    validation = draft.take("validation_file")
    if validation is not None:
        task["data"]["validation"] = validation
    draft.note("tasks: the type is a guess; see the README for the others and their columns")
    draft.put("tasks", [task])


def from_axolotl(draft: Draft) -> None:
    """Translate an Axolotl configuration (supervised fine-tuning of all weights)."""
    take_length(draft, epochs="num_epochs")
    take_optimizer(draft)
    take_intervals(draft)
    take_deepspeed(draft)
    draft.put("name", run_name(draft.take("output_dir"), default="axolotl"))
    _model(draft, draft.take("base_model"))
    draft.ignore("base_model_config", "model_type", "tokenizer_type", "is_llama_derived_model")
    attention = "flash_attention_2" if draft.take("flash_attention") else None
    attention = attention or ("sdpa" if draft.take("sdp_attention") else None)
    draft.put("model.attention", attention)
    tokens = draft.take("special_tokens") or {}
    draft.put("model.pad_token", tokens.get("pad_token"))
    for key, value in tokens.items():
        if key != "pad_token":
            draft.note(f"not translated: special_tokens.{key} = {value!r}")
    for key, every in (("evals_per_epoch", "evaluation"), ("saves_per_epoch", "checkpoint")):
        times = draft.take(key)
        if times:
            draft.put(f"{every}.every", f"{1 / float(times):g}ep")
    if draft.take("wandb_project"):
        draft.put("logging.trackers", ["wandb"])
    draft.ignore("wandb_entity", "wandb_watch", "wandb_name", "dataset_prepared_path")
    for key in ("adapter", "load_in_8bit", "load_in_4bit", "sample_packing"):
        if value := draft.take(key):
            draft.note(
                f"not translated: {key} = {value!r}; all weights train, in the precision given"
            )
    if draft.take("unfrozen_parameters"):
        draft.note(
            "unfrozen_parameters: name layer groups in `freezing` instead; `dist-ft freeze-plan` "
            "lists those of the model"
        )
    length = int(draft.take("sequence_len") or 2048)
    share = draft.take("val_set_size")
    draft.put("tasks", [
        _instruction(draft, entry, number=number, length=length, validation=share)
        for number, entry in enumerate(draft.take("datasets") or [{}])
    ])  # fmt: skip


def from_llama_factory(draft: Draft) -> None:
    """Translate a LLaMA-Factory configuration (stage sft; full, freeze or BAdam)."""
    take_length(draft, epochs="num_train_epochs")
    take_optimizer(draft)
    take_intervals(draft)
    take_deepspeed(draft)
    draft.put("name", run_name(draft.take("output_dir"), default="llama-factory"))
    path = draft.take("model_name_or_path")
    _model(draft, path)
    draft.put("model.attention", take_attention(draft.take("flash_attn")))
    stage = draft.take("stage")
    if stage not in (None, "sft"):
        draft.note(f"stage {stage!r}: only supervised fine-tuning (sft) is translated")
    _llama_factory_freezing(draft, path)
    length = int(draft.take("cutoff_len") or 2048)
    share = draft.take("val_size")
    names = str(draft.take("dataset") or TO_FILL).split(",")
    if draft.source.get("dataset"):
        draft.note(
            "dataset: its names are LLaMA-Factory's own; give files or hub ids in their place"
        )
    if template := draft.take("template"):
        draft.note(f"template {template!r}: prompts are used as they are, with `separator` behind")
    draft.put("tasks", [
        _instruction(draft, {"path": name.strip(), "type": "alpaca"}, number=number,
                     length=length, validation=share)
        for number, name in enumerate(names)
    ])  # fmt: skip


def _llama_factory_freezing(draft: Draft, path: Any) -> None:
    kind = draft.take("finetuning_type")
    layers = draft.take("freeze_trainable_layers")
    draft.ignore("freeze_trainable_modules", "badam_mode", "badam_start_block")
    interval = draft.take("badam_switch_interval")
    mode = draft.take("badam_switch_mode")
    if draft.take("use_badam"):
        order = mode if mode in ("ascending", "descending", "random") else "ascending"
        draft.put("freezing", {"policy": "random_block", "blocks": 1, "order": order,
                               "every": f"{int(interval or 50)}step"})  # fmt: skip
    elif kind == "freeze":
        count, blocks = int(layers or 2), count_known_blocks(str(path))
        if blocks is None or count < 0:
            draft.note(f"freeze_trainable_layers = {count}: give `freezing` its depth by hand")
        else:
            draft.put("freezing", {"policy": "static", "depth": max(0, blocks - count)})
            draft.note("embeddings are frozen with the lower blocks; heads and final norm train")
    elif kind not in (None, "full"):
        draft.note(f"finetuning_type {kind!r}: all weights train instead")


def count_known_blocks(path: str) -> int | None:
    """Return the blocks of a model that is here, or that the planner knows."""
    from dist_ft.planning.known import KNOWN

    if path in KNOWN:
        return int(KNOWN[path].get("num_hidden_layers", 0)) or None
    return count_blocks(path)


def _model(draft: Draft, path: Any) -> None:
    if path is None:
        draft.note("model.path: the file names no model: fill it in")
    draft.put("model.path", str(path or TO_FILL))


def _instruction(
    draft: Draft, entry: dict[str, Any], *, number: int, length: int, validation: Any
) -> dict[str, Any]:
    kind = str(entry.get("type", "alpaca")).partition(":")[0]
    if kind not in _FORMATS:
        draft.note(f"datasets[{number}].type {kind!r}: check `prompt` and `response`")
    columns = _FORMATS.get(kind, _FORMATS["alpaca"])
    data: dict[str, Any] = {
        "train": _source(entry.get("path"), subset=entry.get("name"), split=entry.get("split"))
    }
    if validation and 0 < float(validation) < 1:
        data["validation"] = float(validation)
    return {
        "name": "chat" if number == 0 else f"chat{number + 1}",
        "type": "generation",
        **columns,
        "separator": "\n\n",
        "max_length": length,
        "max_target_length": length // 2,
        "data": data,
    }


def _source(path: Any, *, subset: Any = None, split: Any = None) -> Any:
    given = {"path": str(path or TO_FILL), "subset": subset, "split": split}
    found = {key: value for key, value in given.items() if value is not None}
    return found if len(found) > 1 else found["path"]
