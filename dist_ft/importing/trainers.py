"""Translations from Transformers' ``Trainer``, Axolotl and LLaMA-Factory."""

from __future__ import annotations

from typing import Any

from dist_ft.importing.common import (
    run_name,
    take_attention,
    take_intervals,
    take_length,
    take_optimizer,
)
from dist_ft.importing.datasets import axolotl_entries, note_withheld, put_tasks, source_of
from dist_ft.importing.deepspeed import take_deepspeed
from dist_ft.importing.defaults import AXOLOTL, LLAMA_FACTORY, TRAINER, Defaults
from dist_ft.importing.draft import Draft
from dist_ft.importing.values import as_mapping, as_names, as_text
from dist_ft.recipe.errors import TO_FILL
from dist_ft.recipe.model_folder import count_blocks

# With one of these LLaMA-Factory refuses the adapters that it trains by default.
_NO_ADAPTERS = ("use_badam", "use_galore", "use_apollo")


def _take_common(draft: Draft, *, epochs: str, theirs: Defaults) -> None:
    length = take_length(draft, epochs=epochs, theirs=theirs)
    take_optimizer(draft, theirs=theirs, length=length)
    take_intervals(draft, length=length)
    take_deepspeed(draft)


def from_trainer(draft: Draft) -> None:
    """Translate ``TrainingArguments`` with the arguments of Transformers' example scripts."""
    _take_common(draft, epochs="num_train_epochs", theirs=TRAINER)
    draft.put("name", run_name(draft.text("run_name", "output_dir"), default="imported"))
    _model(draft, draft.text("model_name_or_path"))
    task: dict[str, Any] = {"name": "task", "type": "text_classification"}
    length = draft.whole("max_seq_length", "max_length")
    if length is not None:
        task["max_length"] = length
    train = draft.text("train_file", "dataset_name")
    if train is None:
        draft.note("TrainingArguments say nothing of data and task: complete `tasks`")
    task["data"] = {"train": source_of(train, subset=draft.text("dataset_config_name"))}
    validation = draft.text("validation_file")
    if validation is not None:
        task["data"]["validation"] = validation
    else:
        note_withheld(draft)
    draft.note("tasks: the type is a guess; see the README for the others and their columns")
    draft.put("tasks", [task])


def from_axolotl(draft: Draft) -> None:
    """Translate an Axolotl configuration (supervised fine-tuning of all weights)."""
    _take_common(draft, epochs="num_epochs", theirs=AXOLOTL)
    draft.put("name", run_name(draft.text("output_dir"), default="axolotl"))
    _model(draft, draft.text("base_model"))
    draft.ignore("base_model_config", "model_type", "tokenizer_type", "is_llama_derived_model")
    flash, sdpa = draft.flag("flash_attention"), draft.flag("sdp_attention")
    draft.put("model.attention", "flash_attention_2" if flash else "sdpa" if sdpa else None)
    _axolotl_tokens(draft)
    for key, every in (("evals_per_epoch", "evaluation"), ("saves_per_epoch", "checkpoint")):
        times = draft.number(key)
        if times:
            draft.put(f"{every}.every", f"{1 / times:g}ep")
    if draft.text("wandb_project"):
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
    length = draft.whole("sequence_len") or AXOLOTL.length
    put_tasks(draft, axolotl_entries(draft), length=length, split="val_set_size")


def _axolotl_tokens(draft: Draft) -> None:
    for key, value in (draft.take_as(as_mapping, "special_tokens") or {}).items():
        if key == "pad_token" and value is not None:
            draft.put("model.pad_token", as_text(value, "special_tokens.pad_token"))
        elif key != "pad_token":
            draft.note(f"not translated: special_tokens.{key} = {value!r}")


def from_llama_factory(draft: Draft) -> None:
    """Translate a LLaMA-Factory configuration (stage sft; full, freeze or BAdam)."""
    _take_common(draft, epochs="num_train_epochs", theirs=LLAMA_FACTORY)
    draft.put("name", run_name(draft.text("output_dir"), default="llama-factory"))
    path = draft.text("model_name_or_path")
    _model(draft, path)
    take_attention(draft, "flash_attn")
    stage = draft.text("stage")
    if stage not in (None, "sft"):
        draft.note(f"stage {stage!r}: only supervised fine-tuning (sft) is translated")
    _llama_factory_freezing(draft, path)
    length = draft.whole("cutoff_len") or LLAMA_FACTORY.length
    given = draft.take_as(as_names, "dataset")
    if given:
        draft.note(
            "dataset: its names are LLaMA-Factory's own; give files or hub ids in their place, and "
            "their columns where those are not Alpaca's"
        )
    if template := draft.text("template"):
        draft.note(f"template {template!r}: prompts are used as they are, with `separator` behind")
    names = [name.strip() for names in given or [TO_FILL] for name in names.split(",")]
    entries = [{"path": name, "type": "alpaca"} for name in names]
    put_tasks(draft, entries, length=length, split="val_size")


def _llama_factory_freezing(draft: Draft, path: str | None) -> None:
    kind, layers = draft.text("finetuning_type"), draft.whole("freeze_trainable_layers")
    draft.ignore("freeze_trainable_modules", "badam_mode", "badam_start_block")
    interval, mode = draft.whole("badam_switch_interval"), draft.text("badam_switch_mode")
    if draft.flag("use_badam"):
        order = mode if mode in ("ascending", "descending", "random") else "ascending"
        draft.put("freezing", {"policy": "random_block", "blocks": 1, "order": order,
                               "every": f"{interval or 50}step"})  # fmt: skip
    elif kind == "freeze":
        _freeze_lower(draft, path, trains=2 if layers is None else layers)
    elif kind is None and not any(draft.source.get(key) for key in _NO_ADAPTERS):
        draft.note(
            "finetuning_type: the file says nothing, which is 'lora' there: all weights train "
            "instead"
        )
    elif kind not in (None, "full"):
        draft.note(f"finetuning_type {kind!r}: all weights train instead")


def _freeze_lower(draft: Draft, path: str | None, *, trains: int) -> None:
    blocks = count_known_blocks(path or "")
    if blocks is None or trains < 0:
        draft.note(f"freeze_trainable_layers = {trains}: give `freezing` its depth by hand")
    else:
        draft.put("freezing", {"policy": "static", "depth": max(0, blocks - trains)})
        draft.note("embeddings are frozen with the lower blocks; heads and final norm train")


def count_known_blocks(path: str) -> int | None:
    """Return the blocks of a model that is here, or that the planner knows."""
    from dist_ft.planning.known import KNOWN

    if path in KNOWN:
        return int(KNOWN[path].get("num_hidden_layers", 0)) or None
    return count_blocks(path)


def _model(draft: Draft, path: str | None) -> None:
    if path is None:
        draft.note("model.path: the file names no model: fill it in")
    draft.put("model.path", path or TO_FILL)
