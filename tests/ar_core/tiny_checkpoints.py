"""Makes checkpoints of any family that a test can run: three narrow layers, 128 tokens, random float32 weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

VOCAB_SIZE = 128
MAX_CONTEXT = 256
WINDOW = 8

# Tried on every family; each takes what its configuration has.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_CONTEXT,
    "sliding_window": WINDOW,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 3,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_SLIDING_THEN_FULL = ["sliding_attention", "sliding_attention", "full_attention"]

# What a family needs besides, to be small, or to show what is its own.
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5, "layer_types": _SLIDING_THEN_FULL},
    "deepseek_v3": {
        **{"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16},
        **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 8},
        **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    },
    "exaone4": {"layer_types": _SLIDING_THEN_FULL},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "gemma2": {
        **{"layer_types": _SLIDING_THEN_FULL, "query_pre_attn_scalar": 24},
        **{"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    },
    "gemma3_text": {"layer_types": _SLIDING_THEN_FULL, "query_pre_attn_scalar": 24},
    "gemma4_unified_text": {"layer_types": _SLIDING_THEN_FULL, "global_head_dim": 32},
    "granite": {
        **{"embedding_multiplier": 3.0, "attention_multiplier": 0.2},
        **{"residual_multiplier": 0.5, "logits_scaling": 0.3},
    },
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32},
    "smollm3": {"no_rope_layers": [1, 1, 0]},
    "stablelm": {"qk_layernorm": True},
    "olmo": {"clip_qkv": 1.0},
}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A small configuration of a family, with `changes` on top."""
    kind = CONFIG_MAPPING[model_type]
    known = kind().to_dict().keys()
    fitting = {name: value for name, value in _SMALL.items() if kind.attribute_map.get(name, name) in known}
    return kind(**{**fitting, **_OF_FAMILY.get(model_type, {}), **changes})


def make_checkpoint(folder: Path, model_type: str, seed: int = 0, **changes: Any) -> Path:
    """Write config.json and model.safetensors of a small model into `folder`, and return it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            # Freshly made weights are so small, and norms so plain, that a wrong layer would hardly show.
            weight.add_(torch.randn_like(weight) * (0.1 if weight.ndim == 1 else weight.shape[-1] ** -0.5))
    model.save_pretrained(folder)
    return folder
