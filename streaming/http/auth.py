"""The bearer key."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from streaming.http.errors import ApiError
from streaming.http.fish.answers import error_answer

OPEN_PATHS = frozenset({"/health", "/ready"})


class BearerKey:
    """ASGI middleware: lets through requests and sockets that carry the key, and what asks for one of `OPEN_PATHS`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._expected = f"bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS or self._allows(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "this server needs its API key in the header `Authorization: Bearer <key>`",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error_answer(scope["path"], error)(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        for name, value in scope["headers"]:
            if name == b"authorization":
                scheme, _, key = value.partition(b" ")
                return hmac.compare_digest(scheme.lower() + b" " + key.strip(), self._expected)
        return False
