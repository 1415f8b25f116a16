"""Write a task's adapters as a folder that peft loads onto the pre-trained model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dist_ft.model.backbone import MultiTaskModel
from dist_ft.model.lora import ADAPTER, LoraSettings, is_adapter, lora_options
from dist_ft.train.export import new_folder
from dist_ft.train.model_card import adapter_card

_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def export_adapter(
    model: MultiTaskModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str,
    folder: Path,
    settings: LoraSettings,
    card: Mapping[str, Any],
) -> Path:
    """Writes adapters and a new head to a folder for ``peft.PeftModel``; returns the folder.

    Args:
        model: the model with adapters.
        tokenizer: its tokenizer.
        task: name of the task.
        folder: folder to make; appears complete or not at all.
        settings: of the adapters.
        card: what the README.md says; ``base_model`` is where the pre-trained model is.

    Raises:
        ValueError: the folder exists, or the model has no adapters.
    """
    import peft

    with model.task_model(task) as task_model:
        parameters = dict(task_model.named_parameters())
        state = {_saved_name(n): p for n, p in parameters.items() if is_adapter(n)}
        if not state:
            raise ValueError("export --lora adapter: the run has no model.lora; leave --lora out")
        task_type = next(
            (t for s, t in _TASK_TYPES.items() if s in type(task_model).__name__), None
        )
        head = {n.removeprefix(f"heads.{task}."): p for n, p in model.named_parameters()
                if n.startswith(f"heads.{task}.")}  # fmt: skip
        if task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
            head = {}  # it came with the pre-trained model and did not train
        state |= {f"base_model.model.{n}": p for n, p in head.items()}
        config = peft.LoraConfig(
            **lora_options(settings),
            task_type=task_type,
            base_model_name_or_path=str(card.get("base_model")),
            modules_to_save=sorted({n.partition(".")[0] for n in head}) or None,
            inference_mode=True,
        )
        # What peft chose for the architecture, so that loading need not choose again.
        config.target_modules = _targets(task_model)
        labels = dict(getattr(task_model.config, "id2label", None) or {}) if head else {}
    with new_folder(folder) as temporary:
        save_file(_copied(state), temporary / "adapter_model.safetensors", {"format": "pt"})
        config.save_pretrained(str(temporary))
        tokenizer.save_pretrained(temporary)
        text = adapter_card(task=task, labels=[labels[i] for i in sorted(labels)], card=card)
        (temporary / "README.md").write_text(text, encoding="utf-8")
    return folder


def _saved_name(name: str) -> str:
    return f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}"


def _targets(task_model: torch.nn.Module) -> list[str]:
    from peft.tuners.lora import LoraLayer

    return [path for path, module in task_model.named_modules() if isinstance(module, LoraLayer)]


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
