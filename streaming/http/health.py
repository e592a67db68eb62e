"""GET /health, /ready and /metrics: for probes and monitors."""

from __future__ import annotations

import asyncio

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from ar_core.stats import EngineStats
from streaming.client import EngineUnavailable
from streaming.http.errors import RETRY_AFTER_SECONDS
from streaming.http.schema import Health
from streaming.http.served import Client, Models
from streaming.metrics import exposition

_STATS_SECONDS = 2.0  # an engine inside a long step answers after it


async def health(request: Request) -> Response:
    """This process is alive, whatever its engines do; a supervisor restarts those."""
    return _answer(200, "ok", request.app.state.models)


async def ready(request: Request) -> Response:
    models: Models = request.app.state.models
    if all(model.client.ready for model in models.values()):
        return _answer(200, "ready", models)
    return _answer(503, "not ready", models)


async def metrics(request: Request) -> Response:
    models: Models = request.app.state.models
    stats = await asyncio.gather(*(_stats(model.client) for model in models.values()))
    text = exposition(dict(zip(models, stats, strict=True)))
    return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _stats(client: Client) -> EngineStats | None:
    try:
        async with asyncio.timeout(_STATS_SECONDS):
            return await client.stats()
    except (EngineUnavailable, TimeoutError):
        return None


def _answer(status: int, summary: str, models: Models) -> Response:
    engines = {name: _state(model.client) for name, model in models.items()}
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 503 else None
    return Response(msgspec.json.encode(Health(summary, engines)), status, headers, "application/json")


def _state(client: Client) -> str:
    if client.ready:
        return "up"
    return "starting" if client.info is None else "restarting"
