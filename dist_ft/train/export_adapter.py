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
    """Writes adapters and what started random to a folder for ``peft.PeftModel``.

    Beside the adapters that is a new head and the parts that the pre-trained checkpoint lacks. The
    path of the folder is returned.

    Args:
        model: the model with adapters.
        tokenizer: its tokenizer.
        task: name of the task.
        folder: folder to make; appears complete or not at all.
        settings: of the adapters.
        card: what the README.md says; ``base_model`` is where the pre-trained model is, and
            ``revision`` which of its commits or branches, if not the first.

    Raises:
        ValueError: the folder exists, the model has no adapters, or peft can't hold them beside
            what started random.
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
        fresh = _fresh_modules(model, task_model)
        whole = {n: p for n, p in parameters.items() if n.startswith(tuple(f"{m}." for m in fresh))}
        if inner := [n for n in whole if is_adapter(n)]:
            raise ValueError(
                f"export --lora adapter: {inner[0]} lies inside of what the checkpoint of the "
                "pre-trained model lacks, which peft can't express: leave --lora out"
            )
        state |= {f"base_model.model.{n}": p for n, p in (head | whole).items()}
        config = peft.LoraConfig(
            **lora_options(settings),
            task_type=task_type,
            base_model_name_or_path=str(card.get("base_model")),
            revision=card.get("revision"),
            modules_to_save=[*sorted({n.partition(".")[0] for n in head}), *fresh] or None,
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


def _fresh_modules(model: MultiTaskModel, task_model: torch.nn.Module) -> list[str]:
    """Return the modules of the task's model that hold parameters which started random."""
    fresh = {id(p) for n, p in model.named_parameters() if n in model.fresh}
    found = (n for n, p in task_model.named_parameters() if id(p) in fresh)
    return sorted({name.rpartition(".")[0] for name in found})


def _saved_name(name: str) -> str:
    return f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}"


def _targets(task_model: torch.nn.Module) -> list[str]:
    from peft.tuners.lora import LoraLayer

    return [path for path, module in task_model.named_modules() if isinstance(module, LoraLayer)]


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
