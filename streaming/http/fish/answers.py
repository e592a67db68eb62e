"""Answers in Fish Audio's manner: errors as {"status", "message"}; msgpack where the self-hosted server sends it."""

from __future__ import annotations

import base64
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import wraps
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from streaming.http.connection import ClientGone
from streaming.http.errors import ApiError, as_api_error

_log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]
_PATHS = ("/v1/tts", "/v1/references/", "/v1/vqgan/", "/model/")

IGNORED = "X-Triptych-Ignored"  # the header that names fields that were accepted and ignored


def fish(handler: Handler) -> Handler:
    """The same handler, with errors in Fish's shape."""

    @wraps(handler)
    async def answered(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientGone:
            raise
        except Exception as error:  # whatever it is, the client is told in the shape that it knows
            failure = as_fish_error(error)
            return json(error_body(failure), failure.status, failure.headers)

    return answered


def self_hosted(handler: Handler) -> Handler:
    """The same handler, with errors as the self-hosted server's, in the encoding that the client wants."""

    @wraps(handler)
    async def answered(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientGone:
            raise
        except Exception as error:  # as above
            failure = as_fish_error(error)
            return negotiated(
                request, {"success": False, **error_body(failure)}, status=failure.status, headers=failure.headers
            )

    return answered


def as_fish_error(error: Exception) -> ApiError:
    """With the statuses of the cloud: 422 for what is wrong in a request, 429 for too many of them."""
    shown = as_api_error(error)
    if shown.code == "internal_error":
        _log.error("a request failed", exc_info=error)
    if shown.status == 400:
        shown.status = 422
    if shown.code == "queue_full":
        shown.status = 429
    return shown


def error_answer(path: str, error: ApiError) -> Response:
    """An error before any handler was asked, in the shape of the API that the path belongs to."""
    if path == "/model" or path.startswith(_PATHS):
        return json(error_body(error), error.status, error.headers)
    return error.response


def error_body(error: ApiError) -> dict[str, Any]:
    return {"status": error.status, "message": error.message}


def json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def negotiated(
    request: Request, content: Any, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """JSON if `Accept` or `?format=json` asks for it, else msgpack. Bytes are base64 in JSON."""
    if "application/json" in request.headers.get("accept", "") or request.query_params.get("format") == "json":
        return json(_textual(content), status, headers)
    return Response(msgspec.msgpack.encode(content), status, headers, "application/msgpack")


def _textual(content: Any) -> Any:
    match content:
        case bytes():
            return base64.b64encode(content).decode()
        case dict():
            return {name: _textual(value) for name, value in content.items()}
        case list():
            return [_textual(value) for value in content] if content and isinstance(content[0], bytes) else content
        case _:
            return content
