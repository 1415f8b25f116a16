"""Configurations of well-known models, so that a plan for them needs no network."""

from __future__ import annotations

from typing import Any

_LLAMA3: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "pad_token_id": 128001,
}  # fmt: skip
_QWEN25: dict[str, Any] = {
    "model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768,
    "rope_theta": 1000000.0, "pad_token_id": 151643,
}  # fmt: skip
_BERT: dict[str, Any] = {"model_type": "bert", "vocab_size": 30522}
_BASE: dict[str, Any] = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072,
}  # fmt: skip
_LARGE: dict[str, Any] = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096,
}  # fmt: skip

# As published in the models' config.json; only what decides shapes.
KNOWN: dict[str, dict[str, Any]] = {
    "google-bert/bert-base-uncased": _BERT | _BASE,
    "google-bert/bert-large-uncased": _BERT | _LARGE,
    "FacebookAI/roberta-base": {"model_type": "roberta", "vocab_size": 50265,
        "max_position_embeddings": 514, "type_vocab_size": 1, **_BASE},
    "FacebookAI/roberta-large": {"model_type": "roberta", "vocab_size": 50265,
        "max_position_embeddings": 514, "type_vocab_size": 1, **_LARGE},
    "FacebookAI/xlm-roberta-base": {"model_type": "xlm-roberta", "vocab_size": 250002,
        "max_position_embeddings": 514, "type_vocab_size": 1, **_BASE},
    "distilbert/distilbert-base-uncased": {"model_type": "distilbert", "vocab_size": 30522,
        "dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072},
    "answerdotai/ModernBERT-base": {"model_type": "modernbert", "vocab_size": 50368,
        "hidden_size": 768, "num_hidden_layers": 22, "num_attention_heads": 12,
        "intermediate_size": 1152, "max_position_embeddings": 8192, "pad_token_id": 50283,
        "bos_token_id": 50281, "eos_token_id": 50282, "cls_token_id": 50281,
        "sep_token_id": 50282},
    "openai-community/gpt2": {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768,
        "n_layer": 12, "n_head": 12, "n_positions": 1024},
    "google-t5/t5-small": {"model_type": "t5", "vocab_size": 32128, "d_model": 512, "d_kv": 64,
        "d_ff": 2048, "num_layers": 6, "num_heads": 8, "decoder_start_token_id": 0,
        "pad_token_id": 0, "eos_token_id": 1},
    "google-t5/t5-base": {"model_type": "t5", "vocab_size": 32128, "d_model": 768, "d_kv": 64,
        "d_ff": 3072, "num_layers": 12, "num_heads": 12, "decoder_start_token_id": 0,
        "pad_token_id": 0, "eos_token_id": 1},
    "facebook/bart-base": {"model_type": "bart", "vocab_size": 50265, "d_model": 768,
        "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 12,
        "decoder_attention_heads": 12, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072,
        "max_position_embeddings": 1024, "decoder_start_token_id": 2, "pad_token_id": 1,
        "bos_token_id": 0, "eos_token_id": 2},
    "HuggingFaceTB/SmolLM2-135M": {"model_type": "llama", "vocab_size": 49152,
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "tie_word_embeddings": True,
        "max_position_embeddings": 8192},
    "Qwen/Qwen2.5-0.5B": _QWEN25 | {"hidden_size": 896, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864,
        "tie_word_embeddings": True},
    "Qwen/Qwen2.5-1.5B": _QWEN25 | {"hidden_size": 1536, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960,
        "tie_word_embeddings": True},
    "Qwen/Qwen2.5-7B": _QWEN25 | {"vocab_size": 152064, "hidden_size": 3584,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944},
    "meta-llama/Llama-3.2-1B": _LLAMA3 | {"hidden_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 32, "intermediate_size": 8192, "head_dim": 64,
        "tie_word_embeddings": True},
    "meta-llama/Llama-3.2-3B": _LLAMA3 | {"hidden_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 24, "intermediate_size": 8192, "head_dim": 128,
        "tie_word_embeddings": True},
    "meta-llama/Llama-3.1-8B": _LLAMA3 | {"hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "intermediate_size": 14336},
    "meta-llama/Llama-3.1-70B": _LLAMA3 | {"hidden_size": 8192, "num_hidden_layers": 80,
        "num_attention_heads": 64, "intermediate_size": 28672},
    "mistralai/Mistral-7B-v0.3": {"model_type": "mistral", "vocab_size": 32768,
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "sliding_window": None,
        "pad_token_id": 2},
}  # fmt: skip
