"""Builds the engine of a model inside its process; what `WorkerSpec.factory` names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ar_core.config import EngineConfig
from ar_core.engine import Engine
from modalities.checkpoint import Checkpoint
from modalities.registry import build_engine
from streaming.messages import ModelInfo


def build(name: str, checkpoint: str, config: dict[str, Any]) -> tuple[Engine, ModelInfo]:
    """`checkpoint` is a path on this machine, `config` the fields of an EngineConfig."""
    engine = build_engine(Checkpoint(Path(checkpoint)), EngineConfig(**config))
    info = ModelInfo(
        name=name,
        kind="chat",
        device=str(engine.device),
        dtype=str(engine.dtype).removeprefix("torch."),
        max_context=engine.max_context,
        vocab_size=engine.vocab_size,
        eos_token_ids=engine.eos_token_ids,
        kv_slots=engine.pool.num_slots,
    )
    return engine, info
