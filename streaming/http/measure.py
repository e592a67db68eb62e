"""Counts HTTP requests and responses."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from streaming.metrics import HTTP_ACTIVE, HTTP_REQUESTS, HTTP_RESPONSES

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class MeasureHttp:
    """ASGI middleware. Labels are the routes, not the paths asked for, so that nobody can make endless series."""

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._paths = frozenset(route.path for route in routes if isinstance(route, Route))
        self._prefixes = tuple(path.partition("{")[0] for path in self._paths if "{" in path)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        endpoint = self._endpoint(scope["path"])
        method = scope["method"] if scope["method"] in _METHODS else "other"

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                HTTP_RESPONSES.labels(endpoint, method, str(message["status"])).inc()
            await send(message)

        HTTP_REQUESTS.labels(endpoint, method).inc()
        HTTP_ACTIVE.inc()
        try:
            await self._app(scope, receive, counting_send)
        finally:
            HTTP_ACTIVE.dec()

    def _endpoint(self, path: str) -> str:
        if path in self._paths:
            return path
        for prefix in self._prefixes:
            if path.startswith(prefix):
                return prefix + "*"
        return "other"
