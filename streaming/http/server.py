"""One gateway process: the application on a listening socket."""

from __future__ import annotations

import math
import socket
import time
from types import FrameType

import uvicorn

from modalities.chat import ChatModel
from modalities.checkpoint import locate
from streaming.client import EngineClient
from streaming.http.app import build_app
from streaming.http.served import ServedModel
from streaming.settings import EngineAddress, GatewayConfig


def run_gateway(config: GatewayConfig, sock: socket.socket) -> None:
    """Serve HTTP on `sock`, which listens already, until SIGTERM or SIGINT.

    The first signal lets open answers finish, for `drain_seconds` at most; a second one ends them at once.
    """
    settings = config.settings
    models = {engine.name: _served(engine) for engine in config.engines}
    app = build_app(models, api_key=settings.api_key, max_body_bytes=settings.max_body_bytes)
    serve(app, sock, drain_seconds=settings.drain_seconds)


def serve(app: object, sock: socket.socket, *, drain_seconds: float) -> None:
    """The same for any ASGI application."""
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        loop="uvloop",
        http="httptools",
        ws="none",
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


def _served(engine: EngineAddress) -> ServedModel:
    return ServedModel(
        name=engine.name,
        created=int(time.time()),
        client=EngineClient(engine.address),
        chat=ChatModel(locate(engine.checkpoint)),
    )
