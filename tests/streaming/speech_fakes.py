"""A speech model without an engine: whatever the text, it says four frames of a tone."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import numpy as np
from fastapi import FastAPI

from ar_core.request import FinishReason, Output, Request
from ar_core.stats import EngineStats
from audio.voices import VoiceLibrary
from modalities.checkpoint import Checkpoint
from modalities.speech.model import SpeechModel
from modalities.speech.segments import Recording
from streaming.http.app import build_app
from streaming.http.served import ServedVoice
from streaming.messages import ModelInfo
from streaming.speech.references import References
from tests.audio.sounds import tone
from tests.streaming.speech_server import NAME, RATE, TINY

FRAME = [300, *[1] * 10]


class FakeSpeechClient:
    """In place of an EngineClient. `failure` is raised after the first chunk, if there is one."""

    ready = True
    info: ModelInfo | None = None

    def __init__(self) -> None:
        self.failure: Exception | None = None

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def stats(self) -> EngineStats:
        return EngineStats()

    async def submit(self, request: Request) -> AsyncGenerator[Output, None]:
        if isinstance(request.segments[0], Recording):
            codes = np.ones((10, 30), dtype=np.int32)
            yield Output(request.id, [], 0, 0, payload=codes.tobytes(), finish=FinishReason.STOP)
            return
        samples = tone(440, 2 * 2048 / RATE, RATE).tobytes()
        yield Output(request.id, [FRAME, FRAME], 20, 10, payload=samples)
        if self.failure is not None:
            raise self.failure
        yield Output(request.id, [FRAME, FRAME, [259, *[0] * 10]], 20, 10, payload=samples, finish=FinishReason.STOP)


def fake_speech_app(client: FakeSpeechClient, folder: Path, **options: object) -> FastAPI:
    model = SpeechModel(Checkpoint(TINY))
    references = References(model, VoiceLibrary(folder, codec=model.codec_fingerprint), client.submit)
    return build_app({NAME: ServedVoice(NAME, 1700000000, client, model, references)}, **options)  # type: ignore[arg-type]
