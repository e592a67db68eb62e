"""What people send and get (chat, vision, speech), turned into positions and back. `load` is the offline face of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ar_core.request import SamplingParams

if TYPE_CHECKING:
    from ar_core.config import EngineConfig
    from modalities.offline import LanguageModel
    from modalities.offline_speech import VoiceModel

__all__ = ["SamplingParams", "load"]


def load(source: str, config: EngineConfig | None = None, **options: Any) -> LanguageModel | VoiceModel:
    """The model that `source` means (see `modalities.checkpoint.locate`); `options` are fields of EngineConfig.

    A language model has `generate` and `stream`, a speech model `say` and `say_stream`.
    """
    from modalities.offline import load_model  # late: who only wants the records of this package needs no torch

    return load_model(source, config, **options)
