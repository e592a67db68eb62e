"""A client of one streaming answer that costs little enough for hundreds of them in one process."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httptools

_END = b"\n\n"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A URL to POST to, and the headers to send."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)

    def request(self, body: bytes) -> bytes:
        parts = urlsplit(self.url)
        head = {
            "Host": parts.netloc,
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            **self.headers,
        }
        lines = [f"POST {parts.path or '/'} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


class StreamError(RuntimeError):
    """No answer, or one that is no stream: the message says which."""


async def post(endpoint: Endpoint, body: bytes, on_event: Callable[[bytes], None]) -> None:
    """POST on a connection of its own; `on_event` gets what stands behind `data: ` of each event, as it arrives.

    Raises StreamError for any status but 200 and OSError if there is no connection.
    """
    parts = urlsplit(endpoint.url)
    secure = parts.scheme == "https"
    loop = asyncio.get_running_loop()
    protocol = _Stream(on_event, loop.create_future())
    transport, _ = await loop.create_connection(
        lambda: protocol,
        parts.hostname or "",
        parts.port or (443 if secure else 80),
        ssl=ssl.create_default_context() if secure else None,
    )
    try:
        transport.write(endpoint.request(body))
        await protocol.done
    finally:
        transport.close()


class _Stream(asyncio.Protocol):
    """Both asyncio's protocol and the callbacks of httptools' parser."""

    def __init__(self, on_event: Callable[[bytes], None], done: asyncio.Future[None]) -> None:
        self.done = done
        self._on_event = on_event
        self._parser = httptools.HttpResponseParser(self)
        self._rest = b""  # of an event that has not arrived whole
        self._refused = False

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"what the server sent is not HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end("the connection was closed before the answer ended")

    def on_headers_complete(self) -> None:
        self._refused = self._parser.get_status_code() != 200

    def on_body(self, body: bytes) -> None:
        self._rest += body
        if self._refused:
            return
        *events, self._rest = self._rest.split(_END)
        for event in events:
            for line in event.splitlines():
                if line.startswith(b"data:"):
                    self._on_event(line[5:].strip())

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        self._end(f"status {status}: {self._rest.decode(errors='replace')[:300]}" if self._refused else None)

    def _end(self, error: str | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(StreamError(error))
