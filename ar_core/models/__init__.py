"""From a checkpoint on disk to a Backbone, or to all that an engine needs of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ar_core.interfaces import Backbone, Head, SegmentEncoder
from ar_core.layers import multiplies_bfloat16
from ar_core.parallel import Parallel

_ALONE = Parallel()
LOAD_FORMATS = ("auto", "dummy")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What `Engine` takes: `encoders` are those that the model's head needs besides the engine's own."""

    backbone: Backbone
    head: Head
    encoders: Mapping[type, SegmentEncoder]


def load_model(
    source: Path,
    *,
    device: torch.device,
    dtype: str = "auto",
    load_format: str = "auto",
    max_context: int | None = None,
    parallel: Parallel = _ALONE,
) -> LoadedModel:
    """As `load_backbone`, of any kind of model: one that emits tokens, or one that emits frames."""
    from ar_core.heads import TextHead
    from ar_core.models.dual_ar_config import MODEL_TYPES

    _check_choices(dtype, load_format)
    if source.suffix != ".gguf" and _model_type(source) in MODEL_TYPES:
        if parallel.size > 1:
            raise ValueError(f"a dual-AR model runs on one device; it was asked to run on {parallel.size}")
        return _load_dual_ar(source, device, dtype, load_format, max_context)
    backbone = load_backbone(
        source, device=device, dtype=dtype, load_format=load_format, max_context=max_context, parallel=parallel
    )
    return LoadedModel(backbone, TextHead(backbone), {})


def load_backbone(
    source: Path,
    *,
    device: torch.device,
    dtype: str = "auto",
    load_format: str = "auto",
    max_context: int | None = None,
    parallel: Parallel = _ALONE,
) -> Backbone:
    """The model in `source`: a folder with config.json and safetensors, or a .gguf file.

    dtype "auto" is the checkpoint's on a GPU, and on a CPU bfloat16 where the CPU multiplies it quickly, else
    float32. load_format "dummy" needs no weights, only config.json, and makes random ones. Raises ValueError
    for a model that is not supported, WeightError for tensors that do not fit, FileNotFoundError for files that
    are not there.
    """
    _check_choices(dtype, load_format)
    if source.suffix == ".gguf":
        return _load_gguf(source, device, dtype, max_context, parallel)
    return _load_folder(source, device, dtype, load_format, max_context, parallel)


def _check_choices(dtype: str, load_format: str) -> None:
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format is {load_format!r}; it must be one of {', '.join(LOAD_FORMATS)}")
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of auto, {', '.join(DTYPES)}")


def _model_type(folder: Path) -> str | None:
    config_file = folder / "config.json"
    if not config_file.exists():
        raise FileNotFoundError(f"{folder} has no config.json; a model is a folder with one, or a .gguf file")
    return json.loads(config_file.read_text()).get("model_type")


def _load_folder(
    folder: Path, device: torch.device, dtype: str, load_format: str, max_context: int | None, parallel: Parallel
) -> Backbone:
    from ar_core.models.llama import MODEL_TYPES, Llama
    from ar_core.weights import DummyWeights, SafetensorsWeights, Weights

    model_type = _model_type(folder)
    if model_type not in MODEL_TYPES:
        from ar_core.models.transformers import load_transformers_backbone

        if parallel.size > 1:
            raise ValueError(
                f"a model of type {model_type} runs on one device; tensor parallelism, here over {parallel.size} "
                f"ranks, is for models of type {', '.join(MODEL_TYPES)}"
            )
        if dtype == "auto" and device.type == "cpu":
            dtype = "bfloat16" if multiplies_bfloat16() else "float32"
        return load_transformers_backbone(
            folder, device=device, dtype=dtype, load_format=load_format, max_context=max_context
        )
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    chosen = _choose_dtype(dtype, config.dtype, device)
    weights: Weights
    if load_format == "dummy":
        weights = DummyWeights(device, chosen, parallel)
    else:
        weights = SafetensorsWeights(folder, device, chosen, parallel)
    model = Llama(config, weights, eos_token_ids=_eos_token_ids(folder), max_context=max_context)
    weights.finish()
    return model


def _load_dual_ar(
    folder: Path, device: torch.device, dtype: str, load_format: str, max_context: int | None
) -> LoadedModel:
    from ar_core.frame_encoders import FrameEncoder, FrameTokenEncoder
    from ar_core.frame_head import FrameHead
    from ar_core.models.dual_ar import FastTransformer, SlowTransformer
    from ar_core.models.dual_ar_config import DualARConfig
    from ar_core.request import Frames, Tokens
    from ar_core.torch_weights import TorchWeights
    from ar_core.weights import DummyWeights, SafetensorsWeights, Weights

    config = DualARConfig.read(folder)
    chosen = _choose_dtype(dtype, config.dtype, device)
    weights: Weights
    if load_format == "dummy":
        weights = DummyWeights(device, chosen, Parallel())
    elif (folder / "model.pth").exists():
        weights = TorchWeights(folder / "model.pth", device, chosen, Parallel())
    else:
        weights = SafetensorsWeights(folder, device, chosen, Parallel())
    slow = SlowTransformer(config, weights, max_context)
    head = FrameHead(slow, FastTransformer(config, weights), device)
    weights.finish()
    encoders: dict[type, SegmentEncoder] = {
        Tokens: FrameTokenEncoder(slow.vocab_size, head.width),
        Frames: FrameEncoder(slow.semantic, slow.codebook_size, head.width),
    }
    return LoadedModel(slow, head, encoders)


def _load_gguf(path: Path, device: torch.device, dtype: str, max_context: int | None, parallel: Parallel) -> Backbone:
    from ar_core.gguf_weights import GGUFFile, GGUFWeights
    from ar_core.models.llama import Llama

    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    file = GGUFFile(path)
    weights = GGUFWeights(file, device, _choose_dtype(dtype, torch.bfloat16, device), parallel)
    model = Llama(
        file.config(),
        weights,
        eos_token_ids=file.eos_token_ids(),
        max_context=max_context,
        rope_factors=file.rope_factors,
    )
    weights.finish()
    return model


def _choose_dtype(asked: str, stored: torch.dtype | None, device: torch.device) -> torch.dtype:
    if asked != "auto":
        return DTYPES[asked]
    if device.type == "cpu":
        return torch.bfloat16 if multiplies_bfloat16() else torch.float32
    return stored or torch.bfloat16


def _eos_token_ids(folder: Path) -> tuple[int, ...]:
    """From generation_config.json and config.json: either may hold one id or a list."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        found = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
        ids.update([found] if isinstance(found, int) else found or [])
    return tuple(sorted(ids))
