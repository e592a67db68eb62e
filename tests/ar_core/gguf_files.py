"""Writes GGUF files as llama.cpp's converter would: its names, its order of rows, any kind of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGMLQuantizationType,
    GGUFWriter,
    RopeScalingType,
    get_tensor_name_map,
)
from gguf.constants import MODEL_ARCH
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tests.ar_core.tiny_checkpoints import tiny_config

# Rows of 256 inputs: one block of the K kinds.
_SMALL = {
    **{"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "rms_norm_eps": 1e-5},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
}
# Where in a block of a K kind its float16 scales are.
_SCALES = {
    "Q2_K": slice(80, 84),
    "Q3_K": slice(108, 110),
    "Q4_K": slice(0, 4),
    "Q5_K": slice(0, 4),
    "Q6_K": slice(208, 210),
}
# So small that weights come to be about 0.05.
_SCALE = {"Q2_K": 2e-3, "Q3_K": 5e-4, "Q4_K": 1e-4, "Q5_K": 5e-5, "Q6_K": 4e-5}


class Tensor:
    """Rows as a file stores them, float or blocks, and what they stand for: float32 [rows, columns] or [n]."""

    def __init__(self, stored: np.ndarray, kind: str) -> None:
        self.stored = stored
        self.kind = GGMLQuantizationType[kind]

    @property
    def values(self) -> torch.Tensor:
        if self.kind is GGMLQuantizationType.F32:
            return torch.from_numpy(self.stored.copy())
        if self.kind is GGMLQuantizationType.F16:
            return torch.from_numpy(self.stored.astype(np.float32))
        return torch.from_numpy(dequantize(self.stored, self.kind).copy())


def matrix(rng: np.random.Generator, rows: int, columns: int, kind: str) -> Tensor:
    if kind in _SCALES:
        return Tensor(_random_blocks(rng, rows, columns, kind), kind)
    values = (rng.standard_normal((rows, columns)) * 0.08).astype(np.float32)
    return Tensor(quantize(values, GGMLQuantizationType[kind]), kind)


def _random_blocks(rng: np.random.Generator, rows: int, columns: int, kind: str) -> np.ndarray:
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (rows, columns // values, size), dtype=np.uint8)
    scales = blocks[..., _SCALES[kind]]
    random = rng.uniform(0.5, 1.5, (*scales.shape[:2], scales.shape[2] // 2)) * _SCALE[kind]
    scales[:] = random.astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def gguf_config(architecture: str, **changes: Any) -> PreTrainedConfig:
    return tiny_config(architecture, **{**_SMALL, **changes})


def random_tensors(config: PreTrainedConfig, kind: str, seed: int = 0) -> dict[str, Tensor]:
    """All that a model of the configuration needs, by transformers' names: matrices of one kind, the rest float32."""
    rng = np.random.default_rng(seed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {}
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            tensors[name] = matrix(rng, *weight.shape, kind)
        else:
            values = rng.standard_normal(weight.shape) * 0.1 + (1.0 if "norm" in name else 0.0)
            tensors[name] = Tensor(values.astype(np.float32), "F32")
    return tensors


def reference(config: PreTrainedConfig, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """Transformers' model with what the tensors stand for."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    loaded = model.load_state_dict({name: tensor.values for name, tensor in tensors.items()}, strict=False)
    assert loaded.unexpected_keys == [] and set(loaded.missing_keys) <= {"lm_head.weight"}
    return model


def write_gguf(
    path: Path,
    config: PreTrainedConfig,
    tensors: Mapping[str, Tensor],
    *,
    rope_factors: np.ndarray | None = None,
    fields: Mapping[str, Any] | None = None,
    architecture: str | None = None,
) -> Path:
    """Write a file. `fields` are integers and floats, and RopeScalingType, by their names below the architecture's.

    One that is None is left out.
    """
    architecture = architecture or config.model_type
    writer = GGUFWriter(path, architecture)
    described = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "rope.dimension_count": config.head_dim if architecture == "llama" else None,
        "attention.key_length": config.head_dim if architecture == "qwen3" else None,
        **(fields or {}),
    }
    for name, value in described.items():
        key = name if name.startswith("tokenizer.") else f"{architecture}.{name}"
        if isinstance(value, RopeScalingType):
            writer.add_string(key, value.value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif value is not None:
            writer.add_float32(key, value)
    names = get_tensor_name_map(MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    for name, tensor in tensors.items():
        stored = tensor.stored
        if architecture == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
            stored = _rotary_pairs_adjacent(stored, config, name)
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(known or name, np.ascontiguousarray(stored), raw_dtype=tensor.kind)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _rotary_pairs_adjacent(rows: np.ndarray, config: PreTrainedConfig, name: str) -> np.ndarray:
    """Within each head: row i of the first half, row i of the second, then i + 1."""
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    half = len(rows) // heads // 2
    order = [head * 2 * half + side * half + i for head in range(heads) for i in range(half) for side in (0, 1)]
    return rows[order]
