"""The README.md of an exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dist_ft.version import __version__

PIPELINES = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForAudioClassification": "audio-classification",
}
CUSTOM_PIPELINES = {"question-answering", "text2text-generation"}
_EXAMPLES = {
    "text-classification": '"a text"',
    "token-classification": '"a text"',
    "question-answering": 'question="Who did it?", context="Ada did it."',
    "text-generation": '"a prompt"',
    "text2text-generation": '"a text"',
    "image-classification": '"an image file"',
    "audio-classification": '"a sound file"',
}
_READERS = {  # the others have a tokenizer
    "image-classification": ("processor", "AutoImageProcessor"),
    "audio-classification": ("extractor", "AutoFeatureExtractor"),
}
_RESERVED = {"metrics", "recipe", "base_model", "revision"}


def model_card(
    *, task: str, auto_class: str, labels: Sequence[str], card: Mapping[str, Any]
) -> str:
    """Returns the model card as Markdown.

    Args:
        task: task name.
        auto_class: transformers auto class to load the folder with.
        labels: label names, empty for tasks without.
        card: ``metrics`` (name -> value), ``recipe`` (the resolved recipe), ``base_model``; any
            other key becomes a section.
    """
    card = _without_folders(card)
    recipe = card.get("recipe") or {}
    base = card.get("base_model") or _base_model(recipe)
    pipeline = PIPELINES[auto_class]
    front = {
        "library_name": "transformers",
        "pipeline_tag": pipeline,
        "tags": ["dist_ft", "generated_from_trainer"],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {task}\n",
        f"A model for {pipeline.replace('-', ' ')}, fine-tuned from `{base}` with dist_ft "
        f"{__version__}. It needs transformers only.\n",
        f"## Use\n\n{_usage(auto_class, pipeline)}\n",
        f"## Metrics\n\n{_table(card.get('metrics') or {})}\n",
    ]
    if labels:
        names = "\n".join(f"{index}. {name}" for index, name in enumerate(labels))
        parts.append(f"## Labels\n\n{names}\n")
    for key, value in card.items():
        if key not in _RESERVED:
            parts.append(f"## {key.replace('_', ' ').capitalize()}\n\n{_block(value)}\n")
    parts.append(f"## Recipe\n\n{_block(recipe)}\n")
    return "\n".join(parts)


def adapter_card(*, task: str, labels: Sequence[str], card: Mapping[str, Any]) -> str:
    """Returns the card of a folder with adapters, as Markdown; `card` as in `model_card`."""
    card = _without_folders(card)
    base = card.get("base_model") or _base_model(card.get("recipe") or {})
    front = {"library_name": "peft", "base_model": base, "tags": ["dist_ft", "lora"]}
    count = f", num_labels={len(labels)}" if labels else ""
    if card.get("revision"):
        count += f", revision={card['revision']!r}"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {task}\n",
        f"LoRA adapters for `{base}`, trained with dist_ft {__version__}. They need transformers "
        "and peft.\n",
        "## Use\n\nLoad the base model with the transformers class of the task"
        f"{count and f' (`from_pretrained(base{count})`)'}, then "
        "`peft.PeftModel.from_pretrained(model, FOLDER)`.\n",
        f"## Metrics\n\n{_table(card.get('metrics') or {})}\n",
    ]
    if labels:
        names = "\n".join(f"{index}. {name}" for index, name in enumerate(labels))
        parts.append(f"## Labels\n\n{names}\n")
    parts.append(f"## Recipe\n\n{_block(card.get('recipe') or {})}\n")
    return "\n".join(parts)


def _without_folders(value: Any) -> Any:
    """Returns a value with absolute paths cut down to their names: a card is there to be shared."""
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    if isinstance(value, str | Path) and Path(value).is_absolute():
        return Path(value).name or str(value)
    return value


def _base_model(recipe: Mapping[str, Any]) -> str:
    model = recipe.get("model")
    return str(model.get("path", "unknown")) if isinstance(model, Mapping) else "unknown"


def _usage(auto_class: str, pipeline: str) -> str:
    trust = ", trust_remote_code=True" if pipeline in CUSTOM_PIPELINES else ""
    name, reader = _READERS.get(pipeline, ("tokenizer", "AutoTokenizer"))
    lines = [
        "```python",
        f"from transformers import {reader}, {auto_class}, pipeline",
        "",
        f'pipe = pipeline("{pipeline}", model="THIS FOLDER"{trust})',
        f"pipe({_EXAMPLES[pipeline]})",
        "",
        f'model = {auto_class}.from_pretrained("THIS FOLDER")',
        f'{name} = {reader}.from_pretrained("THIS FOLDER")',
        "```",
    ]
    if trust:
        lines.append(
            "\nThe pipeline's code is the Python file in this folder: transformers has none of its "
            "own for this task any more. The model itself loads without it."
        )
    return "\n".join(lines)


def _table(metrics: Mapping[str, float]) -> str:
    if not metrics:
        return "Not evaluated."
    rows = [f"| {name} | {value:.4f} |" for name, value in metrics.items()]
    return "\n".join(["| metric | value |", "|---|---|", *rows])


def _block(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"```yaml\n{yaml.safe_dump(value, sort_keys=False, allow_unicode=True)}```"
