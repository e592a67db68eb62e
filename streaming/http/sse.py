"""A stream of server-sent events, written straight to ASGI."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from streaming.http.connection import while_connected
from streaming.http.errors import as_api_error

_log = logging.getLogger(__name__)
_encoder = msgspec.json.Encoder()

DONE = b"data: [DONE]\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(data: msgspec.Struct) -> bytes:
    return b"data: " + _encoder.encode(data) + b"\n\n"


class EventStream(Response):
    """Sends what `events` yields, each one or more whole events, then `[DONE]`.

    The headers wait for the first of them, so that an error up to there still gets a status of its own; a later one
    becomes an event. `events` is closed at once when the client disconnects.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            chunk = await anext(events)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                async for chunk in events:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                ending = DONE
            except Exception as error:  # whatever it is, a stream that has begun must end as one
                shown = as_api_error(error)
                if shown.code == "internal_error":
                    _log.exception("a stream failed")
                ending = event(shown.body) + DONE
            await send({"type": "http.response.body", "body": ending, "more_body": False})
