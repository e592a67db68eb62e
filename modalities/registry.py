"""Which parts make up the engine of a checkpoint."""

from __future__ import annotations

from ar_core.config import EngineConfig
from ar_core.device import pick_device
from ar_core.engine import Engine
from ar_core.heads import TextHead
from ar_core.models import load_backbone
from modalities.checkpoint import Checkpoint


def build_engine(checkpoint: Checkpoint, config: EngineConfig) -> Engine:
    """The engine that serves this checkpoint. Raises ValueError for a model that is not supported."""
    backbone = load_backbone(
        checkpoint.path,
        device=pick_device(config.device),
        dtype=config.dtype,
        load_format=config.load_format,
        max_context=config.max_context,
    )
    return Engine(backbone, TextHead(backbone), config)
