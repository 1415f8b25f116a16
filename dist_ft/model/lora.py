"""Low-rank adapters (LoRA, Hu et al. 2021) in the shared backbone, made by peft.

The adapters are ordinary parameters of the block that they are in, so freezing, multi-task heads,
ZeRO, checkpoints and the cache of a frozen prefix treat them like any other. What the checkpoint of
the pre-trained model brought never trains; what it lacks (a pooler, mostly) trains whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_ft.model.backbone import MultiTaskModel, seeded
from dist_ft.model.layer_groups import LayerGroup

ADAPTER = "default"  # peft's name for the one adapter that there is
_LANGUAGE_MODELS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


@dataclass(frozen=True)
class LoraSettings:
    """Which linear layers get an adapter, and of what kind.

    Attributes:
        r: rank.
        alpha: the adapter's output is multiplied by alpha / r.
        dropout: dropout before the adapter.
        target_modules: names, or ends of paths, of the layers; ``None`` takes peft's choice for
            the architecture, ``["all-linear"]`` every linear layer.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: Sequence[str] | None = None


def add_lora(model: MultiTaskModel, settings: LoraSettings, *, seed: int) -> None:
    """Puts adapters into the backbone of `model`; until they have trained they change nothing.

    Args:
        model: the model, before any engine has wrapped it.
        settings: what the adapters are.
        seed: seed of the run; the global random state is left as it was.

    Raises:
        RuntimeError: peft is not installed.
        ValueError: no layer has such a name, or peft has no choice for the architecture.
    """
    peft = _peft()
    backbone: Any = model.backbone
    # Modules that start random train whole and need no adapter.
    fresh = sorted({n.removeprefix("backbone.").rpartition(".")[0] for n in model.fresh})
    config = peft.LoraConfig(**lora_options(settings), exclude_modules=fresh or None)
    try:
        with seeded(seed, "lora"):
            peft.inject_adapter_in_model(config, backbone, adapter_name=ADAPTER)
    except ValueError as error:
        first = str(error).strip().partition("\n")[0]
        names = sorted(
            {n.rpartition(".")[2] for n, m in backbone.named_modules() if isinstance(m, nn.Linear)}
        )
        raise ValueError(
            f"model.lora.target_modules: {first} The linear layers of "
            f"{type(backbone).__name__} are called {', '.join(names)}: name some of them"
        ) from error
    model.requires_grad_(requires_grad=True)  # layer groups say what trains, not peft


def lora_options(settings: LoraSettings) -> dict[str, Any]:
    """Returns the settings as arguments of ``peft.LoraConfig``."""
    targets: Any = settings.target_modules
    if targets is not None:
        targets = "all-linear" if list(targets) == ["all-linear"] else list(targets)
    return {
        "r": settings.r,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": targets,
    }


def fix_base(
    groups: Sequence[LayerGroup],
    *,
    auto_classes: Mapping[str, str],
    fresh: Set[str] = frozenset(),
) -> list[LayerGroup]:
    """Returns the layer groups with everything fixed but the adapters and what starts random.

    A language model's head comes with its checkpoint, so it is fixed too, as in peft.

    Args:
        groups: layer groups of a model with adapters.
        auto_classes: task name -> the transformers auto class of its head.
        fresh: names of the backbone's parameters that start random.
    """
    trained_heads = {
        f"head.{task}" for task, name in auto_classes.items() if name not in _LANGUAGE_MODELS
    }
    return [
        replace(
            group,
            fixed=frozenset(n for n in group.parameters if not is_adapter(n) and n not in fresh),
        )
        if group.name not in trained_heads
        else group
        for group in groups
    ]


def is_adapter(name: str) -> bool:
    """Returns whether a parameter belongs to an adapter."""
    return any(part.startswith("lora_") for part in name.split("."))


def has_lora(model: nn.Module) -> bool:
    """Returns whether `model` has adapters."""
    return any(is_adapter(name) for name, _ in model.named_parameters())


@contextmanager
def merged_lora(model: MultiTaskModel) -> Iterator[None]:
    """Adds the adapters to the weights beside them and hides them, inside the context.

    The sums have the precision of the weights: in bf16 they are rounded. Does nothing to a model
    without adapters.
    """
    layers = list(_layers(model.backbone)) if has_lora(model) else []
    kept: list[Tensor] = []
    with torch.no_grad():
        for parent, name, layer in layers:
            base = layer.get_base_layer()
            kept.append(base.weight.detach().clone())
            layer.merge()
            setattr(parent, name, base)
    try:
        yield
    finally:
        with torch.no_grad():
            for (parent, name, layer), weight in zip(layers, kept, strict=True):
                layer.unmerge()
                layer.get_base_layer().weight.copy_(weight)  # subtracting would leave roundings
                setattr(parent, name, layer)


def _layers(backbone: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    from peft.tuners.lora import LoraLayer

    for parent in backbone.modules():
        for name, child in parent.named_children():
            if isinstance(child, LoraLayer):
                yield parent, name, child


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise RuntimeError(
            "model.lora: the package peft is not installed: pip install 'dist-ft[lora]', or remove "
            "the section"
        ) from error
    return peft
