"""A stream of server-sent events, written straight to ASGI."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import msgspec

from streaming.http.errors import ApiError
from streaming.http.streamed import Streamed

_encoder = msgspec.json.Encoder()

DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(data: msgspec.Struct) -> bytes:
    return b"data: " + _encoder.encode(data) + b"\n\n"


class EventStream(Streamed):
    """Sends what `events` yields, each one or more whole events, then `[DONE]`. A late error is an event, too."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=HEADERS)

    def ending(self, error: ApiError | None) -> bytes | None:
        return DONE if error is None else event(error.body) + DONE
