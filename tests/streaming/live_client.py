"""A client of the socket /v1/tts/live."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from websockets.sync.client import ClientConnection, connect

pack, unpack = msgspec.msgpack.encode, msgspec.msgpack.decode
FRAMES = 6


class Live:
    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    def event(self, name: str, **fields: Any) -> None:
        self.socket.send(pack({"event": name, **fields}))

    def start(self, **fields: Any) -> None:
        request = {"text": "", "temperature": 0, "max_new_tokens": FRAMES, "format": "pcm", "latency": "low", **fields}
        self.event("start", request=request)

    def text(self, text: str) -> None:
        self.event("text", text=text)

    def next(self) -> dict[str, Any]:
        event: dict[str, Any] = unpack(self.socket.recv(timeout=30))
        return event

    def until_finish(self) -> tuple[bytes, list[dict[str, Any]]]:
        """The sound, and the other events; the last is `finish`."""
        sound, others = b"", []
        while not others or others[-1]["event"] != "finish":
            event = self.next()
            if event["event"] == "audio":
                sound += event["audio"]
            else:
                others.append(event)
        return sound, others

    def say(self, *pieces: str, **fields: Any) -> tuple[bytes, dict[str, Any]]:
        """A whole utterance: its sound, and `finish`."""
        self.start(**fields)
        for piece in pieces:
            self.text(piece)
        self.event("stop")
        sound, others = self.until_finish()
        assert [event["event"] for event in others] == ["finish"], others
        assert others[0]["reason"] == "stop"
        return sound, others[0]


@contextmanager
def live(url: str, **headers: str) -> Iterator[Live]:
    with connect(url.replace("http", "ws", 1) + "/v1/tts/live", additional_headers=headers, max_size=None) as socket:
        yield Live(socket)
