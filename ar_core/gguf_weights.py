"""Weights and configuration out of a GGUF file, under the names and shapes that transformers uses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from transformers import AutoConfig, PreTrainedConfig

from ar_core.layers import Product
from ar_core.parallel import Parallel
from ar_core.quantized import Packed4Linear, hidden_dtype, read_q4, unpacked_dtype
from ar_core.weights import Weights, with_bias

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
KINDS = ("F32", "F16", "BF16", *_QUANTISED)
_PACKED = ("Q4_0", "Q4_1")
# Bytes that the unpacked copies beside packed weights may take; a larger model keeps the packed ones alone.
_UNPACKED_BYTES = 1 << 30

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class _Reader(GGUFReader):
    """Reads metadata three times as fast, by slicing the mapped file as a plain array."""

    @property
    def data(self) -> Any:
        return self._plain

    @data.setter
    def data(self, mapped: Any) -> None:
        self._plain = mapped.view(np.ndarray)


class GGUFFile:
    """A GGUF file's metadata, and its tensors by their transformers names.

    Raises ValueError for a file that is not one, is cut short, or is of an architecture that is not supported.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._reader = _Reader(path)
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path} is no whole GGUF file ({error})") from error
        self.path = path
        self.architecture = str(self.field("general.architecture"))
        if self.architecture not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise ValueError(f"{path} is of architecture {self.architecture!r}; GGUF files can be of {known}")
        self.tensors = {_transformers_name(t.name): t for t in self._reader.tensors if t.name != "rope_freqs.weight"}

    def field(self, name: str, default: Any = None) -> Any:
        found = self._reader.get_field(name)
        return default if found is None else found.contents()

    def dequantised(self, tensor: ReaderTensor) -> torch.Tensor:
        """[rows, columns] or [n], float32."""
        kind = tensor.tensor_type.name
        if kind not in KINDS:
            raise ValueError(f"tensor {tensor.name} of {self.path} is {kind}; supported are {', '.join(KINDS)}")
        if kind in ("F32", "F16"):
            return torch.from_numpy(np.array(tensor.data, dtype=np.float32))
        return torch.from_numpy(np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type)))

    @property
    def rope_factors(self) -> torch.Tensor | None:
        """What each rotary frequency is divided by, as Llama 3.1 stores its scaling: [head_dim / 2]."""
        found = [t for t in self._reader.tensors if t.name == "rope_freqs.weight"]
        return self.dequantised(found[0]) if found else None

    def eos_token_ids(self) -> tuple[int, ...]:
        ids = (self.field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        return tuple(sorted({int(i) for i in ids if i is not None}))

    def config(self) -> PreTrainedConfig:
        """The configuration that transformers would have for this model. Raises ValueError if the file lacks a part."""

        def own(name: str, default: Any = None) -> Any:
            return self.field(f"{self.architecture}.{name}", default)

        def needed(name: str) -> Any:
            value = own(name)
            if value is None:
                raise ValueError(f"{self.path} does not say {self.architecture}.{name}")
            return value

        embedding = self.tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise ValueError(f"{self.path} has no tensor token_embd.weight")
        heads = needed("attention.head_count")
        dim = needed("embedding_length")
        config = AutoConfig.for_model(
            self.architecture,
            vocab_size=embedding.data.shape[0],
            hidden_size=dim,
            intermediate_size=needed("feed_forward_length"),
            num_hidden_layers=needed("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=own("attention.head_count_kv", heads),
            head_dim=own("attention.key_length") or own("rope.dimension_count") or dim // heads,
            rms_norm_eps=needed("attention.layer_norm_rms_epsilon"),
            max_position_embeddings=needed("context_length"),
            tie_word_embeddings="lm_head.weight" not in self.tensors,
            rope_parameters=self._rope(own),
        )
        return config

    def _rope(self, own: Any) -> dict[str, Any]:
        rope = {"rope_type": "default", "rope_theta": own("rope.freq_base", 10000.0)}
        kind, factor = own("rope.scaling.type"), own("rope.scaling.factor")
        if kind in (None, "none") or not factor:
            return rope
        if kind == "linear":
            return rope | {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            original = own("rope.scaling.original_context_length")
            return rope | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        raise ValueError(f"{self.path} scales its rotary embedding by {kind!r}; supported are none, linear and yarn")


class GGUFWeights(Weights):
    def __init__(self, file: GGUFFile, device: torch.device, dtype: torch.dtype, parallel: Parallel) -> None:
        super().__init__(device, dtype, parallel)
        self._file = file
        config = file.config()
        self._heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        # torch's packed product takes bfloat16 on a CPU, and whole groups of 32 rows.
        self._may_pack = device.type == "cpu" and dtype == torch.bfloat16 and parallel.size == 1
        packed = sum(t.n_elements for t in file.tensors.values() if t.tensor_type.name in _PACKED)
        self._keep_unpacked = packed * unpacked_dtype().itemsize <= _UNPACKED_BYTES
        kinds = {t.tensor_type.name for name, t in file.tensors.items() if name.endswith("_proj.weight")}
        if self._may_pack and self._keep_unpacked and kinds.issubset(_PACKED):
            self.hidden_dtype = hidden_dtype

    def names(self) -> set[str]:
        return set(self._file.tensors)

    def read(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        return self._in_order(name, self._file.dequantised(self._file.tensors[name]))

    def column_linear(self, names: Sequence[str], sizes: Sequence[int], in_features: int, bias: bool) -> Product:
        packed = self._packed(names, sizes, in_features)
        if packed is None:
            return super().column_linear(names, sizes, in_features, bias)
        return with_bias(packed, self._column_bias(names, sizes) if bias else None)

    def row_linear(self, name: str, out_features: int, in_features: int, bias: bool) -> Product:
        packed = self._packed([name], [out_features], in_features)
        if packed is None:
            return super().row_linear(name, out_features, in_features, bias)
        return with_bias(packed, self.tensor(f"{name}.bias", (out_features,)) if bias else None)

    def _packed(self, names: Sequence[str], sizes: Sequence[int], in_features: int) -> Packed4Linear | None:
        """The named layers as one packed product, if all their weights are of a kind that can be."""
        tensors = [self._file.tensors.get(f"{name}.weight") for name in names]
        if not self._may_pack or sum(sizes) % 32:
            return None
        parts = []
        for name, size, tensor in zip(names, sizes, tensors, strict=True):
            fits = tensor is not None and list(tensor.shape[::-1]) == [size, in_features]
            if tensor is None or not fits or tensor.tensor_type.name not in _PACKED:
                return None
            blocks = read_q4(np.asarray(tensor.data), tensor.tensor_type.name)
            parts.append([self._in_order(f"{name}.weight", part) for part in blocks])
            self._taken.add(f"{name}.weight")
        q, d, m = (torch.cat(part) for part in zip(*parts, strict=True))
        return Packed4Linear(q, d, m, keep_unpacked=self._keep_unpacked)

    def _in_order(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """GGUF stores the rows of Llama's q and k so that rotary pairs are adjacent; put them back into halves."""
        layer = name.split(".")[-2] if "." in name else ""
        if self._file.architecture != "llama" or layer not in self._heads:
            return tensor
        grouped = tensor.view(self._heads[layer], -1, 2, *tensor.shape[1:])
        return grouped.transpose(1, 2).reshape(tensor.shape)


def _transformers_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; unknown names stay, and are reported as extra."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _NAMES:
        return name
    prefix = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{prefix}{_NAMES[match[2]]}.{match[3]}"
