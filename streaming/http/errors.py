"""What can go wrong, as OpenAI's error object: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ar_core.request import QueueFull, RequestError
from audio.errors import AudioError
from audio.voices import LibraryFull, UnknownVoice, VoiceExists
from streaming.client import EngineUnavailable
from streaming.http.schema import ErrorBody, ErrorDetail

RETRY_AFTER_SECONDS = 1

_MAX_SHOWN = 80  # characters of a wrong value in a message


class ApiError(Exception):
    """An answer that is an error: `status` is HTTP's, `param` names the field at fault, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    @property
    def body(self) -> ErrorBody:
        return ErrorBody(ErrorDetail(self.message, _kind(self.status), self.param, self.code))

    @property
    def response(self) -> Response:
        return Response(msgspec.json.encode(self.body), self.status, self.headers, "application/json")


def bad_request(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unsupported(message: str, param: str) -> ApiError:
    return bad_request(message, param, "unsupported_value")


def try_later(message: str, code: str) -> ApiError:
    return ApiError(503, message, code=code, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})


def shown(value: Any) -> str:
    """A client's value as it may stand in a message: short, whatever was sent."""
    match value:
        case list():
            return f"an array of {len(value)}"
        case dict():
            return "an object"
        case _:
            text = json.dumps(value, ensure_ascii=False, default=str)
            return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def as_api_error(error: Exception) -> ApiError:
    """The error that a client should see; of a fault of the gateway's own no more than that it is one."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return bad_request(str(error), error.param)
        case UnknownVoice():
            return ApiError(404, str(error), param="voice", code="voice_not_found")
        case VoiceExists() | LibraryFull():
            return ApiError(409, str(error), param="name", code="conflict")
        case AudioError():
            return bad_request(str(error), code="invalid_audio")
        case QueueFull():
            message = str(error) or "the queue is full"
            return try_later(f"{message}; try again in a moment", "queue_full")
        case EngineUnavailable():
            return try_later(str(error) or "the engine is not running", "engine_unavailable")
        case HTTPException(status_code=404):
            return ApiError(404, "no such path; GET /docs lists those that exist", code="unknown_url")
        case HTTPException(status_code=405):
            allowed = (error.headers or {}).get("Allow", "")
            message = f"this path does not take that method; it takes {allowed}"
            return ApiError(405, message, code="method_not_allowed", headers=dict(error.headers or {}))
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
        case _:
            # uvicorn closes the connection of a request that failed; who is told does not send the next one on it.
            headers = {"Connection": "close"}
            return ApiError(500, "the server failed to answer this request", code="internal_error", headers=headers)


def _kind(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 404:
        return "not_found_error"
    return "invalid_request_error" if status < 500 else "server_error"
