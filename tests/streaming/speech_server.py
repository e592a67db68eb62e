"""A gateway in front of a real speech engine with the tiny checkpoint, all in this process."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import uvicorn
from fastapi import FastAPI

from ar_core.config import EngineConfig
from audio.voices import VoiceLibrary
from modalities.checkpoint import Checkpoint
from modalities.speech.engine import SpeechEngine
from modalities.speech.model import SpeechModel
from streaming.client import EngineClient
from streaming.factory import build
from streaming.http.app import build_app
from streaming.http.served import ServedVoice
from streaming.speech.references import References
from streaming.worker import Worker
from tests.audio.sounds import vowels

TINY = Path(__file__).parents[1] / "data" / "s2-tiny"
NAME = "tiny"
RATE = 44100
TRANSCRIPT = "Hello there, this is a reference."


@dataclass(frozen=True)
class SpeechServer:
    url: str
    engine: SpeechEngine
    library: VoiceLibrary

    @property
    def socket_url(self) -> str:
        return f"{self.url.replace('http', 'ws')}/v1/audio/speech/stream"

    def until_idle(self, seconds: float = 10) -> None:
        """Wait for the engine to have nothing left; then everything must have been given back."""
        self.until(self._is_idle, seconds)

    def _is_idle(self) -> bool:
        stats, stage = self.engine.stats(), self.engine._stage
        return (
            not self.engine.has_work
            and (stats.running, stats.waiting) == (0, 0)
            and stats.kv_slots_used == stats.kv_slots_cached
            and not stage._streams
            and stage._free == 128
        )

    @staticmethod
    def until(condition: Callable[[], bool], seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@contextmanager
def speech_server(folder: Path, **options: Any) -> Iterator[SpeechServer]:
    """`options` are `build_app`'s."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = {"device": "cpu", "dtype": "float32"}
    engine, info = build(NAME, str(TINY), config)
    assert isinstance(engine, SpeechEngine) and EngineConfig().max_running == 64
    address = f"ipc://{folder}/engine"
    worker = Worker(engine, info, address)
    thread = threading.Thread(target=worker.run)
    thread.start()
    model, client = SpeechModel(Checkpoint(TINY)), EngineClient(address)
    library = VoiceLibrary(folder / "voices", codec=model.codec_fingerprint)
    served = ServedVoice(NAME, 1700000000, client, model, References(model, library, client.submit))
    try:
        with serving(build_app({NAME: served}, **options)) as url:
            SpeechServer.until(lambda: client.ready)
            yield SpeechServer(url, engine, library)
    finally:
        worker.drain()
        thread.join(10)
        torch.set_num_threads(threads)


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Like `http_fakes.running`, with WebSockets as a gateway has them."""
    sock = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, loop="uvloop", http="httptools", ws="websockets-sansio", lifespan="on", log_level="critical"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


def recording(seconds: float = 1.5, pitch: float = 1.0) -> bytes:
    """A wav file of something like a voice."""
    samples = vowels(seconds * pitch, RATE)
    squeezed = np.interp(np.arange(0, len(samples) - 1, pitch), np.arange(len(samples)), samples)
    file = io.BytesIO()
    soundfile.write(file, squeezed.astype(np.float32), RATE, format="WAV")
    return file.getvalue()
