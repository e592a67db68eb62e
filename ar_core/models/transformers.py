"""Decoders in transformers' own code, served: their attention is replaced by ours, everything else is theirs."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from ar_core.attention.base import AttentionBackend
from ar_core.batch import Batch
from ar_core.models.transformers_examine import Examination, close
from ar_core.models.transformers_seam import SERVING, Seam, Serving
from ar_core.models.transformers_support import UnsupportedModel, reason_against, supported_model_types

__all__ = ["TransformersBackbone", "UnsupportedModel", "load_transformers_backbone", "supported_model_types"]

_log = logging.getLogger(__name__)


def load_transformers_backbone(
    source: Path,
    *,
    device: torch.device,
    dtype: str = "auto",
    load_format: str = "auto",
    max_context: int | None = None,
) -> TransformersBackbone:
    """Load a checkpoint folder: config.json, and safetensors unless the format is dummy.

    dtype: auto (the checkpoint's own), bfloat16, float16 or float32.
    load_format: auto, or dummy for random weights from config.json alone.
    max_context: positions that a sequence may have; by default, and at most, what the model was made for.
    Raises UnsupportedModel, a ValueError, for an architecture that cannot be served, and ValueError for a dtype or
    format that there is not and for tensors that are missing or misshapen.
    """
    config = _read_config(source)
    context = _context(config, max_context)
    model: torch.nn.Module = _build(source, config, dtype, load_format)
    return TransformersBackbone(cast(PreTrainedModel, model.to(device)), context, _eos_token_ids(source, config))


class TransformersBackbone:
    """A `Backbone` around a causal language model, made with `SERVING` as its attention; it takes the model over."""

    def __init__(self, model: PreTrainedModel, max_context: int, eos_token_ids: tuple[int, ...]) -> None:
        model.eval().requires_grad_(False)
        self._embedding = model.get_input_embeddings()
        self._decoder = _decoder(model)
        self._seam = Seam(model)
        _fix_rotations(self._decoder, max_context)
        findings = Examination(model, self._decoder, self._seam, max_context).findings()
        self._layers = findings.layers
        self._model = _without_decoder(model, self._decoder)
        if not close(self.logits(findings.hidden), findings.logits):
            raise UnsupportedModel(model.config.model_type, "its logits are not made from the last hidden states alone")
        self.kv_layout = findings.kv_layout
        self.max_context = max_context
        self.vocab_size: int = model.config.vocab_size
        self.eos_token_ids = eos_token_ids
        self.dtype = model.dtype

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        """int64 [T, 1] -> [T, dim]."""
        hidden: torch.Tensor = self._embedding(inputs[:, 0])
        return hidden

    def forward(self, hidden: torch.Tensor, batch: Batch, attention: AttentionBackend) -> torch.Tensor:
        """[T, dim] -> [T, dim], after the final norm. The T positions go through the model as one row."""
        out = self._seam.run(
            Serving(attention, self._layers),
            self._decoder,
            inputs_embeds=hidden[None],
            position_ids=batch.positions[None],
            use_cache=False,
        )
        rows: torch.Tensor = out.last_hidden_state[0]
        return rows

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, dim] -> float32 [S, vocab]."""
        out = self._model(inputs_embeds=hidden[None], use_cache=False)
        rows: torch.Tensor = out.logits[0].float()
        return rows


@dataclass
class _Hidden(ModelOutput):
    """What a decoder returns, as far as a head needs it. A model that passes on the rest of it finds nothing there."""

    last_hidden_state: torch.Tensor | None = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _NoDecoder(torch.nn.Module):
    """Stands where the decoder stood, so that the model's forward is its head alone: scales, caps and all."""

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> _Hidden:
        return _Hidden(inputs_embeds)


def _decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The part between embeddings and head. Families where `decoder` names the head have it as their base model."""
    named = model.get_decoder()
    return cast(PreTrainedModel, named if isinstance(named, PreTrainedModel) else model.base_model)


def _without_decoder(model: PreTrainedModel, decoder: torch.nn.Module) -> PreTrainedModel:
    for module in model.modules():
        for name, child in module.named_children():
            if child is decoder:
                setattr(module, name, _NoDecoder())
                return model
    raise UnsupportedModel(model.config.model_type, "it is its own decoder, without a language model's head")


def _fix_rotations(decoder: torch.nn.Module, max_context: int) -> None:
    """Settle rotary frequencies that would follow the longest sequence, so that a place means the same in every batch.

    They become those of a sequence of `max_context` positions.
    """
    for module in decoder.modules():
        kinds: Any = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and kinds != "default":
            _settle(module, max_context)
            object.__setattr__(module, "rope_type", _settled(kinds))
        elif isinstance(kinds, dict):
            for layer_type, kind in kinds.items():
                if kind != "default":
                    _settle(module, max_context, layer_type=layer_type)
                    kinds[layer_type] = _settled(kind)


def _settled(kind: str) -> str:
    """A name under which transformers finds nothing to update before a forward."""
    return f"settled {kind.replace('dynamic', 'ntk')}"


def _settle(rotary: torch.nn.Module, max_context: int, **layer_type: str) -> None:
    device = next(rotary.buffers()).device
    rotary(torch.zeros(1, device=device), torch.tensor([[max_context - 1]], device=device), **layer_type)


def _read_config(source: Path) -> PreTrainedConfig:
    path = source / "config.json"
    if not path.is_file():
        raise ValueError(f"{source} has no config.json; a checkpoint folder of transformers' layout is needed")
    model_type = json.loads(path.read_text()).get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModel(str(model_type), "this version of transformers does not know it")
    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    reason = reason_against(config)
    if reason is not None:
        raise UnsupportedModel(config.model_type, reason)
    return config


def _context(config: PreTrainedConfig, asked: int | None) -> int:
    made_for: int | None = getattr(config, "max_position_embeddings", None)
    if made_for is None:
        if asked is None:
            raise ValueError(f"{config.model_type}'s config.json names no context length; give max_context")
        return asked
    return min(asked or made_for, made_for)


def _build(source: Path, config: PreTrainedConfig, dtype: str, load_format: str) -> PreTrainedModel:
    number_format = _number_format(config, dtype)
    if load_format == "dummy":
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=number_format, attn_implementation=SERVING, trust_remote_code=False
        )
        return model
    if load_format != "auto":
        raise ValueError(f"load_format is {load_format!r}; it must be auto or dummy")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        dtype=number_format,
        attn_implementation=SERVING,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model, report = loaded
    _check_report(source, report)
    return model


def _check_report(source: Path, report: dict[str, Any]) -> None:
    wrong = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    wrong += [f"{name} is {list(has)}, not {list(wants)}" for name, has, wants in sorted(report["mismatched_keys"])]
    wrong += list(report["error_msgs"])
    if wrong:
        raise ValueError(f"the weights in {source} do not fit its config.json: {'; '.join(wrong)}")
    if report["unexpected_keys"]:
        _log.warning(
            "%s holds tensors that the model does not use: %s", source, ", ".join(sorted(report["unexpected_keys"]))
        )


def _number_format(config: PreTrainedConfig, dtype: str) -> torch.dtype:
    formats = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype == "auto":
        own = config.dtype
        return own if isinstance(own, torch.dtype) else torch.float32
    if dtype not in formats:
        raise ValueError(f"dtype is {dtype!r}; it must be auto, {', '.join(formats)}")
    return formats[dtype]


def _eos_token_ids(source: Path, config: PreTrainedConfig) -> tuple[int, ...]:
    """generation_config.json's, which lists the end of a turn too, before config.json's."""
    path = source / "generation_config.json"
    generation = json.loads(path.read_text()) if path.is_file() else {}
    ids = generation.get("eos_token_id", getattr(config, "eos_token_id", None))
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (ids,)
