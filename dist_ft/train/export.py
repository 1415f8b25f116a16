"""Write a task's model as a plain transformers folder."""

from __future__ import annotations

import copy
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dist_ft.engine.ds_setup import choose_accelerator
from dist_ft.model.backbone import MultiTaskModel, quiet_transformers
from dist_ft.tasks.end_tokens import stop_tokens
from dist_ft.train.file_mode import follow_umask
from dist_ft.train.model_card import CUSTOM_PIPELINES, PIPELINES, model_card

_PIPELINE_FILES = {
    "question-answering": ("pipeline_question_answering", "QuestionAnsweringPipeline"),
    "text2text-generation": ("pipeline_text2text", "Text2TextPipeline"),
}
_WINDOW_SETTINGS = {"max_length": 384, "doc_stride": 128, "max_answer_length": 30}


def export_task(
    model: MultiTaskModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str,
    folder: Path,
    card: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes a task's model to a new folder that loads without dist_ft; returns the folder.

    The folder has config.json, safetensors weights, the tokenizer, README.md and, for tasks that
    transformers has no pipeline for, the code of one. It appears complete or not at all.

    Args:
        model: the model; left as it was.
        tokenizer: its tokenizer.
        task: name of the task.
        folder: folder to make.
        card: what the README.md says: ``metrics`` (name -> value), ``recipe`` (as resolved), and
            further sections.
        weights: whole parameters by name as in ``model.named_parameters()``, to write instead of
            the model's own, which may be partitioned.

    Raises:
        ValueError: there is no such task, the folder exists, or weights are missing.
    """
    if task not in model.tasks:
        raise ValueError(f"export: the model has no task {task!r}, only {', '.join(model.tasks)}")
    choose_accelerator()  # accelerate, with which transformers saves, imports DeepSpeed
    with new_folder(folder) as temporary:
        with model.task_model(task) as task_model:
            auto_class = _auto_class(task_model)
            config = _export_config(task_model, auto_class=auto_class, task=task, card=card)
            state = _state(task_model, model=model, weights=weights)
            ends = _ends(task_model, tokenizer, auto_class=auto_class, task=task, card=card)
            _save(task_model, config=config, ends=ends, state=state, folder=temporary)
        tokenizer.save_pretrained(temporary)
        _add_pipeline(PIPELINES[auto_class], folder=temporary)
        labels = _labels(config, auto_class=auto_class)
        text = model_card(task=task, auto_class=auto_class, labels=labels, card=card)
        (temporary / "README.md").write_text(text, encoding="utf-8")
    return folder


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to fill, which gets its name when it is complete and durable.

    Raises:
        ValueError: there is such a folder already.
    """
    if folder.exists():
        raise ValueError(f"export: {folder} exists already: remove it, or move it away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        yield temporary
        _sync(temporary)
        temporary.rename(folder)
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _auto_class(task_model: PreTrainedModel) -> str:
    from transformers.models.auto import modeling_auto

    mappings = {
        "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
        "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
        "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
        "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
        "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
        "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
        "AutoModelForAudioClassification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
    }
    for auto_class, mapping in mappings.items():
        known = getattr(modeling_auto, mapping).get(type(task_model.config), None)
        if type(task_model) in (known if isinstance(known, tuple) else (known,)):
            return auto_class
    raise ValueError(f"export: no transformers auto class is known for {type(task_model).__name__}")


def _export_config(
    task_model: PreTrainedModel, *, auto_class: str, task: str, card: Mapping[str, Any]
) -> Any:
    config = copy.deepcopy(task_model.config)
    settings = _settings(card, task=task)
    pipeline = PIPELINES[auto_class]
    if pipeline in CUSTOM_PIPELINES:
        module, name = _PIPELINE_FILES[pipeline]
        config.custom_pipelines = {pipeline: {"impl": f"{module}.{name}", "pt": [auto_class]}}
    if pipeline == "question-answering":
        config.question_answering = {
            key: settings.get(key, default) for key, default in _WINDOW_SETTINGS.items()
        }
    return config


def _settings(card: Mapping[str, Any], *, task: str) -> Mapping[str, Any]:
    """The task's section of the recipe."""
    tasks = (card.get("recipe") or {}).get("tasks") or ()
    return next((t for t in tasks if t.get("name") == task), {})


def _ends(
    task_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    auto_class: str,
    task: str,
    card: Mapping[str, Any],
) -> list[int] | None:
    """The tokens at which generation ends, as in evaluation; None for a model that writes none."""
    generates = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
    if auto_class not in generates or task_model.generation_config is None:
        return None
    settings = _settings(card, task=task)
    chat = bool(settings.get("chat")) or settings.get("messages") is not None
    known = task_model.generation_config.eos_token_id
    return stop_tokens(tokenizer, task=task, chat=chat, known=known)


def _state(
    task_model: PreTrainedModel, *, model: MultiTaskModel, weights: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The tensors of the task's model, without parts of the backbone that only others have."""
    with torch.device("meta"):
        wanted = type(task_model)(copy.deepcopy(task_model.config)).state_dict().keys()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state: dict[str, Tensor] = {}
    for key, tensor in task_model.state_dict(keep_vars=True).items():
        if key not in wanted:
            continue
        name = names.get(id(tensor))
        if weights is None or name is None:  # a buffer is never partitioned
            state[key] = tensor.detach()
        elif name in weights:
            state[key] = weights[name].detach()
        else:
            raise ValueError(f"export: the given weights lack {name}")
    missing = sorted(wanted - state.keys())
    assert not missing, missing
    return state


def _save(
    task_model: PreTrainedModel,
    *,
    config: Any,
    ends: list[int] | None,
    state: dict[str, Tensor],
    folder: Path,
) -> None:
    own = task_model.config
    task_model.config = config
    try:
        with quiet_transformers():
            task_model.save_pretrained(folder, state_dict=state)
    finally:
        task_model.config = own
    if ends is not None:
        # In the file, as transformers refuses to save what it would not write itself any more.
        path = folder / "generation_config.json"
        body = json.loads(path.read_text()) if path.is_file() else {}
        body["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        path.write_text(json.dumps(body, indent=2, sort_keys=True) + "\n")


def _add_pipeline(pipeline: str, *, folder: Path) -> None:
    if pipeline in _PIPELINE_FILES:
        name = f"{_PIPELINE_FILES[pipeline][0]}.py"
        shutil.copyfile(Path(__file__).with_name(name), folder / name)


def _labels(config: Any, *, auto_class: str) -> list[str]:
    if auto_class not in (
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoModelForImageClassification",
        "AutoModelForAudioClassification",
    ):
        return []
    return [config.id2label[index] for index in sorted(config.id2label)]


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*")]:
        if path.is_file():
            follow_umask(path)
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
