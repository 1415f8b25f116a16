"""Tiny configurations of many transformers architectures, for tests."""

from typing import Any

import transformers
from transformers import PreTrainedConfig

SIZE = 16
VOCABULARY = 64
_STANDARD: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": SIZE, "num_hidden_layers": 3,
    "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LLAMA: dict[str, Any] = _STANDARD | {"num_key_value_heads": 1, "head_dim": 8}
_MOE: dict[str, Any] = _LLAMA | {"moe_intermediate_size": 8, "num_experts_per_tok": 2}
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": SIZE, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 0, "forced_eos_token_id": None,
}  # fmt: skip
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": SIZE, "d_kv": 8, "d_ff": 24, "num_layers": 2,
    "num_decoder_layers": 3, "num_heads": 2, "pad_token_id": 0, "eos_token_id": 1,
    "decoder_start_token_id": 0,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": SIZE, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
_SPEECH: dict[str, Any] = _STANDARD | {
    "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip

ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _STANDARD,
    "roberta": _STANDARD,
    "xlm-roberta": _STANDARD,
    "xlm-roberta-xl": _STANDARD,
    "camembert": _STANDARD,
    "data2vec-text": _STANDARD,
    "albert": _STANDARD | {"embedding_size": 8},
    "distilbert": {
        "vocab_size": VOCABULARY, "dim": SIZE, "n_layers": 3, "n_heads": 2, "hidden_dim": 24,
        "max_position_embeddings": 64,
    },
    "electra": _STANDARD | {"embedding_size": 8},
    "deberta": _STANDARD | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": _STANDARD
    | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "norm_rel_ebd": "layer_norm",
       "position_buckets": 8, "share_att_key": True},
    "modernbert": _STANDARD | {"cls_token_id": 1, "sep_token_id": 2},
    "xlnet": {"vocab_size": VOCABULARY, "d_model": SIZE, "n_layer": 3, "n_head": 2, "d_inner": 24},
    "xlm": {
        "vocab_size": VOCABULARY, "emb_dim": SIZE, "n_layers": 3, "n_heads": 2,
        "max_position_embeddings": 64,
    },
    "flaubert": {
        "vocab_size": VOCABULARY, "emb_dim": SIZE, "n_layers": 3, "n_heads": 2,
        "max_position_embeddings": 64,
    },
    "mpnet": _STANDARD,
    "nystromformer": _STANDARD | {"num_landmarks": 4, "segment_means_seq_len": 12},
    "roformer": _STANDARD,
    "rembert": _STANDARD | {"input_embedding_size": 8, "output_embedding_size": 8},
    "convbert": _STANDARD | {"embedding_size": 8, "head_ratio": 2, "conv_kernel_size": 3},
    "mobilebert": _STANDARD
    | {"embedding_size": 8, "intra_bottleneck_size": 8, "true_hidden_size": 8},
    "esm": _STANDARD | {"position_embedding_type": "rotary", "mask_token_id": 3},
    "ernie": _STANDARD,
    "megatron-bert": _STANDARD,
    "fnet": _STANDARD,
    "ibert": _STANDARD,
    "longformer": _STANDARD | {"attention_window": 4},
    "big_bird": _STANDARD | {"attention_type": "original_full"},
    "layoutlm": _STANDARD,
}  # fmt: skip

DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": VOCABULARY, "n_embd": SIZE, "n_layer": 3, "n_head": 2, "n_positions": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "openai-gpt": {
        "vocab_size": VOCABULARY, "n_embd": SIZE, "n_layer": 3, "n_head": 2, "n_positions": 64,
        "pad_token_id": 0,
    },
    "gpt_neo": {
        "vocab_size": VOCABULARY, "hidden_size": SIZE, "num_layers": 2, "num_heads": 2,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
        "window_size": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "gptj": {
        "vocab_size": VOCABULARY, "n_embd": SIZE, "n_layer": 3, "n_head": 2, "n_positions": 64,
        "rotary_dim": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "gpt_neox": _STANDARD,
    "codegen": {
        "vocab_size": VOCABULARY, "n_embd": SIZE, "n_layer": 3, "n_head": 4, "n_positions": 64,
        "rotary_dim": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "bloom": {
        "vocab_size": VOCABULARY, "hidden_size": SIZE, "n_layer": 3, "n_head": 2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "opt": _STANDARD | {"ffn_dim": 24, "word_embed_proj_dim": 8},
    "falcon": _STANDARD,
    "mpt": {
        "vocab_size": VOCABULARY, "d_model": SIZE, "n_layers": 3, "n_heads": 2, "max_seq_len": 64,
        "pad_token_id": 0,
    },
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA | {"num_local_experts": 2},
    "qwen2": _LLAMA,
    "qwen2_moe": _MOE | {"num_experts": 2, "shared_expert_intermediate_size": 8},
    "qwen3": _LLAMA,
    "qwen3_moe": _MOE | {"num_experts": 2},
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "phi": _STANDARD,
    "phi3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA | {"query_pre_attn_scalar": 8},
    "gemma3_text": _LLAMA | {"query_pre_attn_scalar": 8},
    "cohere": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": _LLAMA,
    "granite": _LLAMA,
    "smollm3": _LLAMA,
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": SIZE, "num_hidden_layers": 3,
              "state_size": 4, "pad_token_id": 0},
}  # fmt: skip

SEQ2SEQ: dict[str, dict[str, Any]] = {
    "t5": _T5,
    "mt5": _T5,
    "umt5": _T5,
    "longt5": _T5 | {"local_radius": 4, "global_block_size": 4},
    "bart": _SEQ2SEQ,
    "mbart": _SEQ2SEQ,
    "marian": _SEQ2SEQ,
    "pegasus": _SEQ2SEQ,
    "m2m_100": _SEQ2SEQ,
    "blenderbot": _SEQ2SEQ,
    "prophetnet": {
        "vocab_size": VOCABULARY, "hidden_size": SIZE, "num_encoder_layers": 3,
        "num_decoder_layers": 3, "num_encoder_attention_heads": 2,
        "num_decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
        "max_position_embeddings": 64, "pad_token_id": 0,
    },
}  # fmt: skip

OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("AutoModelForImageClassification", _VISION),
    "swin": (
        "AutoModelForImageClassification",
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": (1, 2),
            "num_heads": (2, 2),
            "window_size": 2,
        },
    ),
    "beit": ("AutoModelForImageClassification", _VISION),
    "dinov2": ("AutoModelForImageClassification", _VISION),
    "wav2vec2": ("AutoModelForAudioClassification", _SPEECH),
    "hubert": ("AutoModelForAudioClassification", _SPEECH),
}


def tiny_config(name: str) -> PreTrainedConfig:
    """Returns a configuration of the architecture that is quick to build and run."""
    values = {**ENCODERS, **DECODERS, **SEQ2SEQ}.get(name) or OTHERS[name][1]
    return transformers.AutoConfig.for_model(name, **values)
