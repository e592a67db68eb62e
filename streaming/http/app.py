"""The application: which function answers which path."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ar_core.request import QueueFull, RequestError
from audio.errors import AudioError
from audio.voices import UnknownVoice
from streaming.client import EngineUnavailable
from streaming.http import requests, schema
from streaming.http.auth import BearerKey
from streaming.http.chat import create_chat_completion
from streaming.http.completions import create_completion
from streaming.http.connection import ClientGone
from streaming.http.errors import ApiError, as_api_error
from streaming.http.fish.routes import add_fish_routes
from streaming.http.health import health, metrics, ready
from streaming.http.measure import MeasureHttp
from streaming.http.models import list_models, show_model
from streaming.http.openapi import answers, body_of, describe, docs
from streaming.http.served import Models
from streaming.http.speech.routes import add_speech_routes
from streaming.http.tokenize import detokenize, tokenize

MAX_BODY_BYTES = 32 << 20

_NGINX_CLIENT_CLOSED_REQUEST = 499  # nobody sees it but the metrics

# What handlers raise on purpose, and the rest.
_EXPECTED = (ApiError, RequestError, QueueFull, EngineUnavailable, UnknownVoice, AudioError, HTTPException, Exception)

Handler = Callable[[Request], Awaitable[Response]]


def build_app(
    engines: Models,
    *,
    api_key: str | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    reference_folder: Path | None = None,
) -> FastAPI:
    """The ASGI application that serves these models, by name. It starts and closes their clients.

    reference_folder: whose files requests for speech may name as recordings; None: no files.
    """
    app = FastAPI(
        title="Triptych",
        version="1",  # of the API
        description="Language, voice and images behind the shapes of OpenAI's API.",
        lifespan=_clients_running,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.models = engines
    app.state.max_body_bytes = max_body_bytes
    app.state.reference_folder = reference_folder
    app.openapi = cache(lambda: describe(app, with_key=api_key is not None))  # type: ignore[method-assign]
    _add_routes(app)
    add_speech_routes(app)
    add_fish_routes(app)
    for kind in (
        ApiError,
        RequestError,
        QueueFull,
        EngineUnavailable,
        UnknownVoice,
        AudioError,
        HTTPException,
        Exception,
    ):
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(ClientGone, _answer_nobody)
    if api_key is not None:
        app.add_middleware(BearerKey, key=api_key)
    app.add_middleware(MeasureHttp, routes=app.routes)
    return app


def _add_routes(app: FastAPI) -> None:
    def post(path: str, handler: Handler, summary: str, body: type[Any], responses: dict[int | str, Any]) -> None:
        app.add_api_route(
            path,
            handler,
            methods=["POST"],
            summary=summary,
            responses=responses,
            openapi_extra=body_of(body),
            response_model=None,
        )

    def get(path: str, handler: Handler, summary: str, **options: Any) -> None:
        app.add_api_route(path, handler, methods=["GET"], summary=summary, response_model=None, **options)

    errors = (400, 401, 404, 413)
    generation = (*errors, 500, 503)
    post(
        "/v1/chat/completions",
        create_chat_completion,
        "Answer a conversation",
        requests.ChatRequest,
        answers(schema.ChatCompletion, *generation, chunks=schema.ChatCompletionChunk),
    )
    post(
        "/v1/completions",
        create_completion,
        "Go on from a text or from token ids",
        requests.CompletionRequest,
        answers(schema.Completion, *generation, chunks=schema.Completion),
    )
    get("/v1/models", list_models, "The models that are served", responses=answers(schema.ModelList, 401))
    path_id = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    get(
        "/v1/models/{id:path}",
        show_model,
        "One model",
        responses=answers(schema.ModelCard, 401, 404),
        openapi_extra={"parameters": [path_id]},
    )
    post(
        "/v1/tokenize",
        tokenize,
        "Text or messages to token ids",
        requests.TokenizeRequest,
        answers(schema.Tokenized, *errors),
    )
    post(
        "/v1/detokenize",
        detokenize,
        "Token ids to text",
        requests.DetokenizeRequest,
        answers(schema.Detokenized, *errors),
    )
    get("/health", health, "Whether the server is alive, and its engines", responses=answers(schema.Health))
    not_ready = {503: answers(schema.Health)[200] | {"description": "Not yet, or not at the moment."}}
    get("/ready", ready, "Whether requests can be served", responses=answers(schema.Health) | not_ready)
    text = {200: {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}}
    get("/metrics", metrics, "Figures for Prometheus", responses=text, response_class=Response)
    app.add_route("/openapi.json", _openapi)
    app.add_route("/docs", docs)


async def _openapi(request: Request) -> Response:
    return JSONResponse(request.app.openapi())


@asynccontextmanager
async def _clients_running(app: FastAPI) -> AsyncGenerator[None, None]:
    clients = [model.client for model in app.state.models.values()]
    await asyncio.gather(*(client.start() for client in clients))
    try:
        yield
    finally:
        await asyncio.gather(*(client.close() for client in clients))


async def _answer_error(_: Request, error: Exception) -> Response:
    return as_api_error(error).response


async def _answer_nobody(_: Request, error: Exception) -> Response:
    return Response(status_code=_NGINX_CLIENT_CLOSED_REQUEST)
