"""One gateway process: the application on a listening socket."""

from __future__ import annotations

import math
import socket
import time
from pathlib import Path
from types import FrameType

import uvicorn

from audio.voices import VoiceLibrary
from modalities.chat import ChatModel
from modalities.checkpoint import locate
from modalities.registry import kind_of
from streaming.client import EngineClient
from streaming.http.app import build_app
from streaming.http.served import ServedModel, ServedVoice
from streaming.settings import EngineAddress, GatewayConfig, ServerSettings, voices_folder


def run_gateway(config: GatewayConfig, sock: socket.socket) -> None:
    """Serve HTTP on `sock`, which listens already, until SIGTERM or SIGINT.

    The first signal lets open answers finish, for `drain_seconds` at most; a second one ends them at once.
    """
    settings = config.settings
    models = {engine.name: _served(engine, settings) for engine in config.engines}
    app = build_app(
        models,
        api_key=settings.api_key,
        max_body_bytes=settings.max_body_bytes,
        reference_folder=Path(settings.reference_folder) if settings.reference_folder else None,
    )
    serve(app, sock, drain_seconds=settings.drain_seconds)


def serve(app: object, sock: socket.socket, *, drain_seconds: float) -> None:
    """The same for any ASGI application."""
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        loop="uvloop",
        http="httptools",
        ws="websockets-sansio",
        ws_per_message_deflate=False,  # sound does not get smaller
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(drain_seconds),
    )
    _Server(config).run(sockets=[sock])


class _Server(uvicorn.Server):
    """Ends with a normal exit after a signal, and takes any second signal for "now"."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


def _served(engine: EngineAddress, settings: ServerSettings) -> ServedModel | ServedVoice:
    checkpoint, client, created = locate(engine.checkpoint), EngineClient(engine.address), int(time.time())
    if kind_of(checkpoint) == "chat":
        return ServedModel(engine.name, created, client, ChatModel(checkpoint))
    from modalities.speech.model import SpeechModel  # late: a gateway that only chats needs no codec
    from streaming.speech.references import References

    speech = SpeechModel(checkpoint)
    library = VoiceLibrary(settings.voices or voices_folder(), codec=speech.codec_fingerprint)
    return ServedVoice(engine.name, created, client, speech, References(speech, library, client.submit))
