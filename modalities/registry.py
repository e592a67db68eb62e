"""Which parts make up the engine of a checkpoint."""

from __future__ import annotations

import json
from typing import Literal

import torch

from ar_core.config import EngineConfig
from ar_core.device import pick_device
from ar_core.engine import Engine
from ar_core.models import LoadedModel, load_model
from ar_core.models.dual_ar_config import MODEL_TYPES as DUAL_AR_TYPES
from modalities.checkpoint import Checkpoint
from modalities.speech.engine import SpeechEngine

Kind = Literal["chat", "speech"]


def kind_of(checkpoint: Checkpoint) -> Kind:
    """What a checkpoint is for, by its config.json's model_type."""
    if checkpoint.is_gguf:
        return "chat"
    model_type = json.loads((checkpoint.path / "config.json").read_text()).get("model_type")
    return "speech" if model_type in DUAL_AR_TYPES else "chat"


def build_engine(checkpoint: Checkpoint, config: EngineConfig) -> Engine:
    """The engine of a language model. Raises ValueError for a model that is not supported."""
    model = _load(checkpoint, config)
    return Engine(model.backbone, model.head, config, encoders=model.encoders)


def build_speech_engine(checkpoint: Checkpoint, config: EngineConfig) -> SpeechEngine:
    """The engine of a dual-AR model with its codec. Raises as `build_engine` does."""
    from audio.codec import Codec
    from modalities.speech.codec_stage import CodecStage

    model = _load(checkpoint, config)
    device = pick_device(config.device)
    # On a CPU bfloat16 is slower in convolutions.
    codec = Codec.load(checkpoint.path, device, torch.float32 if device.type == "cpu" else model.backbone.dtype)
    if codec.config.num_codebooks != model.head.width - 1:
        raise ValueError(
            f"the codec in {checkpoint.path} has {codec.config.num_codebooks} codes per frame, and the model emits "
            f"{model.head.width - 1}"
        )
    stage = CodecStage(codec, slots=2 * config.max_running)
    engine = Engine(model.backbone, model.head, config, encoders=model.encoders, output_stage=stage)
    return SpeechEngine(engine, stage, codec)


def _load(checkpoint: Checkpoint, config: EngineConfig) -> LoadedModel:
    return load_model(
        checkpoint.path,
        device=pick_device(config.device),
        dtype=config.dtype,
        load_format=config.load_format,
        max_context=config.max_context,
    )
