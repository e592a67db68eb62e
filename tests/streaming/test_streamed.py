"""Answers sent piece by piece: when headers leave, how they end, and what a client's leaving does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from streaming.http.connection import ClientGone
from streaming.http.errors import ApiError
from streaming.http.streamed import Streamed

Message = dict[str, Any]


class Client:
    """The other side of an ASGI application, which leaves once it has got so many messages."""

    def __init__(self, patience: int = 99) -> None:
        self.got: list[Message] = []
        self._patience = patience
        self._left = asyncio.Event()
        if patience == 0:
            self._left.set()

    async def receive(self) -> Message:
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.got.append(message)
        if len(self.got) == self._patience:
            self._left.set()
        await asyncio.sleep(0)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.got)


class Pieces:
    """Yields, sleeps or raises what it is given, and knows whether it was closed."""

    def __init__(self, *steps: bytes | float | Exception) -> None:
        self._steps = steps
        self.ended = False

    async def run(self) -> AsyncGenerator[bytes, None]:
        try:
            for step in self._steps:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    yield step
        finally:
            self.ended = True


async def send(pieces: Pieces, client: Client, **options: Any) -> None:
    answer = Streamed(pieces.run(), media_type="audio/pcm", **options)
    await answer({"type": "http"}, client.receive, client.send)


async def test_headers_wait_for_the_first_piece() -> None:
    client = Client()
    await send(Pieces(b"one", b"two"), client, headers={"x-a": "1"}, late_headers=lambda: {"x-b": "2"})
    headers = dict(client.got[0]["headers"])
    assert headers[b"x-a"] == b"1" and headers[b"x-b"] == b"2" and b"content-length" not in headers
    assert client.body == b"onetwo" and client.got[-1]["more_body"] is False


async def test_nothing_to_send_is_an_empty_answer() -> None:
    client = Client()
    await send(Pieces(), client)
    assert client.body == b"" and client.got[-1]["more_body"] is False


async def test_an_error_before_the_first_piece_is_the_applications() -> None:
    client, pieces = Client(), Pieces(ApiError(404, "no"))
    with pytest.raises(ApiError):
        await send(pieces, client)
    assert not client.got and pieces.ended


async def test_a_late_error_leaves_the_answer_unfinished() -> None:
    client = Client()
    await send(Pieces(b"one", ApiError(503, "no")), client)
    assert client.body == b"one" and client.got[-1]["more_body"] is True


async def test_who_leaves_in_the_middle_ends_the_work_and_is_no_error() -> None:
    client, pieces = Client(patience=2), Pieces(b"one", 30.0, b"two")
    async with asyncio.timeout(5):
        await send(pieces, client)
    assert client.body == b"one" and pieces.ended


async def test_who_leaves_before_the_answer_is_counted_as_gone() -> None:
    client, pieces = Client(patience=0), Pieces(30.0, b"one")
    async with asyncio.timeout(5):
        with pytest.raises(ClientGone):
            await send(pieces, client)
    assert not client.got
