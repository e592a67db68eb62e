"""What a dual-AR checkpoint says about itself, in either of the two forms that config.json has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MODEL_TYPES = ("fish_qwen3_omni", "dual_ar")
END = "<|im_end|>"


@dataclass(frozen=True, slots=True)
class StackConfig:
    """One of the two transformers."""

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    rope_base: float
    norm_eps: float
    qkv_bias: bool
    out_bias: bool
    qk_norm: bool

    @staticmethod
    def of(raw: Mapping[str, Any]) -> StackConfig:
        kv_heads = raw.get("n_local_heads", -1)
        return StackConfig(
            dim=raw["dim"],
            num_layers=raw["n_layer"],
            num_heads=raw["n_head"],
            num_kv_heads=raw["n_head"] if kv_heads in (-1, None) else kv_heads,
            head_dim=raw.get("head_dim") or raw["dim"] // raw["n_head"],
            intermediate=raw["intermediate_size"],
            rope_base=float(raw.get("rope_base", 10_000)),
            norm_eps=raw.get("norm_eps", 1e-5),
            qkv_bias=raw.get("attention_qkv_bias", False),
            out_bias=raw.get("attention_o_bias", False),
            qk_norm=raw.get("attention_qk_norm", False),
        )


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Prefixes of the slow and the fast transformer's tensors, and the name of the table of codes."""

    slow: str
    fast: str
    codebooks: str


@dataclass(frozen=True, slots=True)
class DualARConfig:
    slow: StackConfig
    fast: StackConfig
    names: TensorNames
    vocab_size: int
    num_codebooks: int
    codebook_size: int
    semantic: range  # the token ids that stand for the first code of a frame
    end_id: int
    max_context: int
    tied: bool
    rescaled: bool  # embeddings of frames are divided by the root of how many were added up
    fast_reads_normed: bool  # the fast transformer starts from the slow state after, not before, the final norm
    dtype: torch.dtype

    @staticmethod
    def read(folder: Path) -> DualARConfig:
        """From config.json and the folder's list of special tokens.

        Raises ValueError for what is missing or does not fit together.
        """
        raw = json.loads((folder / "config.json").read_text())
        specials = special_tokens(folder)
        try:
            return _nested(raw, specials) if raw["model_type"] == "fish_qwen3_omni" else _flat(raw, specials)
        except KeyError as error:
            raise ValueError(f"{folder / 'config.json'} has no {error.args[0]!r}, which this model needs") from None


def _nested(raw: Mapping[str, Any], specials: Mapping[str, int]) -> DualARConfig:
    slow, fast = raw["text_config"], raw["audio_decoder_config"]
    if fast.get("text_dim", slow["dim"]) != slow["dim"]:
        raise ValueError(f"text_dim is {fast['text_dim']}; it must be the text_config's dim, {slow['dim']}")
    return DualARConfig(
        slow=StackConfig.of(slow),
        fast=StackConfig.of({**{key: slow[key] for key in ("rope_base", "norm_eps") if key in slow}, **fast}),
        names=TensorNames("text_model.model.", "audio_decoder.", "audio_decoder.codebook_embeddings"),
        vocab_size=slow["vocab_size"],
        num_codebooks=fast["num_codebooks"],
        codebook_size=fast["vocab_size"],
        semantic=_semantic(raw, specials),
        end_id=_end_id(raw, specials),
        max_context=slow["max_seq_len"],
        tied=slow.get("tie_word_embeddings", True),
        rescaled=True,
        fast_reads_normed=True,
        dtype=_dtype(raw),
    )


def _flat(raw: Mapping[str, Any], specials: Mapping[str, int]) -> DualARConfig:
    prefix = "fast_"
    fast = {key.removeprefix(prefix): value for key, value in raw.items() if key.startswith(prefix)}
    # What the fast transformer does not say about itself is as in the slow one.
    own = {key: value for key, value in fast.items() if value is not None}
    return DualARConfig(
        slow=StackConfig.of(raw),
        fast=StackConfig.of({**raw, **own, "n_layer": raw["n_fast_layer"]}),
        names=TensorNames("", prefix, "codebook_embeddings"),
        vocab_size=raw["vocab_size"],
        num_codebooks=raw["num_codebooks"],
        codebook_size=raw["codebook_size"],
        semantic=_semantic(raw, specials),
        end_id=_end_id(raw, specials),
        max_context=raw["max_seq_len"],
        tied=raw.get("tie_word_embeddings", True),
        rescaled=False,
        fast_reads_normed=bool(raw.get("norm_fastlayer_input", False)),
        dtype=_dtype(raw),
    )


def _semantic(raw: Mapping[str, Any], specials: Mapping[str, int]) -> range:
    first, last = raw.get("semantic_start_token_id"), raw.get("semantic_end_token_id")
    if first is None or last is None:
        ids = sorted(id for name, id in specials.items() if name.startswith("<|semantic:"))
        if not ids:
            raise ValueError(
                "neither config.json (semantic_start_token_id, semantic_end_token_id) nor the tokenizer "
                "(<|semantic:0|> and so on) says which tokens are semantic"
            )
        first, last = ids[0], ids[-1]
        if len(ids) != last - first + 1:
            raise ValueError(f"the {len(ids)} semantic tokens lie scattered over {first} to {last}; they must adjoin")
    return range(first, last + 1)


def _end_id(raw: Mapping[str, Any], specials: Mapping[str, int]) -> int:
    end = specials.get(END, raw.get("eos_token_id"))
    if not isinstance(end, int):
        raise ValueError(f"neither the tokenizer ({END}) nor config.json (eos_token_id) has the token that ends speech")
    return end


def _dtype(raw: Mapping[str, Any]) -> torch.dtype:
    dtype = getattr(torch, str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def special_tokens(folder: Path) -> dict[str, int]:
    """The ids of a tokenizer's added tokens: from tokenizer.json, or special_tokens.json where there is none."""
    file = folder / "tokenizer.json"
    if file.exists():
        return {token["content"]: token["id"] for token in json.loads(file.read_text())["added_tokens"]}
    file = folder / "special_tokens.json"
    return json.loads(file.read_text()) if file.exists() else {}
