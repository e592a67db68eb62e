"""A gateway whose speech engine fails."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ar_core.request import Output, Request
from ar_core.stats import EngineStats
from audio.voices import VoiceLibrary
from modalities.checkpoint import Checkpoint
from modalities.speech.model import SpeechModel
from streaming.http.app import build_app
from streaming.http.served import ServedVoice
from streaming.messages import ModelInfo
from streaming.speech.references import References
from tests.streaming.speech_server import NAME, RATE, TINY, serving


class FailingEngine:
    """In place of an EngineClient: every request ends with `error`, after some seconds of silence if so told."""

    ready = True
    info: ModelInfo | None = None

    def __init__(self, error: Exception, seconds: float) -> None:
        self._error = error
        self._sound = np.zeros(round(RATE * seconds), np.float32).tobytes()

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def stats(self) -> EngineStats:
        return EngineStats()

    async def submit(self, request: Request) -> AsyncGenerator[Output, None]:
        if self._sound:
            yield Output(request.id, [], 1, 0, payload=self._sound)
        raise self._error


@contextmanager
def failing_server(folder: Path, error: Exception, seconds: float = 0) -> Iterator[str]:
    """Its base URL."""
    engine, model = FailingEngine(error, seconds), SpeechModel(Checkpoint(TINY))
    references = References(model, VoiceLibrary(folder / "voices"), engine.submit)
    with serving(build_app({NAME: ServedVoice(NAME, 1700000000, engine, model, references)})) as url:
        yield url
