"""Builds the engine of a model inside its process; what `WorkerSpec.factory` names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ar_core.config import EngineConfig
from ar_core.engine import Engine
from modalities.checkpoint import Checkpoint
from modalities.registry import build_engine, build_speech_engine, kind_of
from modalities.speech.engine import SpeechEngine
from streaming.messages import ModelInfo


def build(name: str, checkpoint: str, config: dict[str, Any]) -> tuple[Engine | SpeechEngine, ModelInfo]:
    """`checkpoint` is a path on this machine, `config` the fields of an EngineConfig."""
    located, settings = Checkpoint(Path(checkpoint)), EngineConfig(**config)
    kind = kind_of(located)
    if kind == "speech":
        speech = build_speech_engine(located, settings)
        return speech, _info(name, kind, speech.engine)
    engine = build_engine(located, settings)
    return engine, _info(name, kind, engine)


def _info(name: str, kind: str, engine: Engine) -> ModelInfo:
    return ModelInfo(
        name=name,
        kind=kind,
        device=str(engine.device),
        dtype=str(engine.dtype).removeprefix("torch."),
        max_context=engine.max_context,
        vocab_size=engine.vocab_size,
        eos_token_ids=engine.eos_token_ids,
        kv_slots=engine.pool.num_slots,
    )
