"""What `network.py` times: shares of the parameters of two models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

from benchmarks.training.workload import MODEL, load_tokenizer

_EMBEDDINGS = {"policy": "static", "frozen": ["embeddings"]}
# What is frozen, by share; the small ones are those of a model of the prototype's size.
FREEZING: dict[str, dict[str, Any]] = {
    "all": {"policy": "none"},
    "half": _EMBEDDINGS,
    "3 of 6": {"policy": "static", "depth": 3},
    "head": {"policy": "static", "depth": 6},
    "small, all": {"policy": "none"},
    "small, half": _EMBEDDINGS,
}
# Shares that are compared with each other, and timed in turn for that.
SMALL = ("small, all", "small, half")
PAIRS = (("all", "half"), SMALL)
_FOLDER = "small-model"


def whole_of(share: str) -> str:
    """Return the share of the same model that trains all of its parameters."""
    return SMALL[0] if share in SMALL else PAIRS[0][0]


def name_of(stage: int, share: str, *, cached: bool) -> str:
    """Return the name of a setting's recipe."""
    words = share.replace(",", "").replace(" ", "-")
    return f"z{stage}-{words}{'-cached' if cached else ''}"


def alone_name(stage: int, share: str) -> str:
    """Return the name of a run of DeepSpeed by itself."""
    return f"alone-z{stage}-{share}"


def model_of(folder: Path, share: str) -> str:
    """Return the path of the model of a share."""
    return str(folder / _FOLDER) if share in SMALL else MODEL


def write_small_model(folder: Path) -> None:
    """Save a model of 6.3 million random weights, half of them in its embeddings.

    Few and wide blocks beside 2,048 positions: what is sent is that of the prototype, whose shape
    is not on record.
    """
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=96,
        intermediate_size=2528,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=2048,
    )
    BertModel(config).save_pretrained(folder / _FOLDER)
    load_tokenizer().save_pretrained(folder / _FOLDER)
