"""The worker, seen from the socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from ar_core.request import FinishReason, RequestError
from benchmarks.fake_engine import FakeEngine
from streaming import messages
from streaming.client import EngineUnavailable
from streaming.messages import Emitted, Hello, Ready, Submit
from tests.streaming.hosting import ask, collect, connected, end, ipc, process_worker, threaded_worker, tokens, until

ENDLESS = 8000


@contextlib.contextmanager
def raw_client(address: str, **options: Any) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        for name, value in options.items():
            setattr(socket, name, value)
        socket.linger = 0
        socket.connect(address)
        yield socket


def send(socket: zmq.Socket[bytes], command: messages.Command) -> None:
    socket.send(messages.encoder.encode(command))


def receive(socket: zmq.Socket[bytes]) -> list[messages.Reply]:
    assert socket.poll(5000), "the worker said nothing"
    return messages.reply_decoder.decode(socket.recv())


@contextlib.asynccontextmanager
async def running(address: str, **arguments: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    child = await process_worker(address, **arguments)
    try:
        yield child
    finally:
        await end(child)


def test_garbage_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with threaded_worker(ipc(tmp_path)), raw_client(ipc(tmp_path)) as socket:
        for garbage in (b"", b"\x00", os.urandom(1000), b"\x92\xa6submit\x01", b"\x91\xa5hell0"):
            socket.send(garbage)
        socket.send_multipart([b"one", b"two", b"three"])
        send(socket, Hello())
        assert isinstance(receive(socket)[0], Ready)
    assert sum("no message" in record.message for record in caplog.records) == 6


def test_one_message_carries_a_whole_step(tmp_path: Path) -> None:
    with threaded_worker(ipc(tmp_path), tokens_per_second=20), raw_client(ipc(tmp_path)) as socket:
        for i in range(30):
            send(socket, Submit.of(i, ask("x", [i + 1], ENDLESS)))
        while len(replies := receive(socket)) < 30:
            pass
        assert [(reply.id, reply.rows) for reply in replies if isinstance(reply, Emitted)] == [
            (i, [[i + 1]]) for i in range(30)
        ]


async def test_a_vanished_client_loses_its_requests(tmp_path: Path) -> None:
    with threaded_worker(ipc(tmp_path), tokens_per_second=200, max_running=2) as engine:
        async with connected(ipc(tmp_path)) as other:
            await other.wait_ready()
            stays = asyncio.create_task(collect(other, ask("stays", [7], 100)))
            with raw_client(ipc(tmp_path)) as socket:
                for i in range(3):
                    send(socket, Submit.of(i, ask("x", [1], ENDLESS)))
                await until(lambda: engine.stats().waiting == 2)
            await until(lambda: len(engine.aborted) == 3, 3)
            assert tokens(await stays) == [7] * 100


async def test_waiting_requests_of_a_vanished_client_are_dropped_too(tmp_path: Path) -> None:
    with threaded_worker(ipc(tmp_path), tokens_per_second=100, max_running=1) as engine:
        async with connected(ipc(tmp_path)) as other:
            await other.wait_ready()
            stays = asyncio.create_task(collect(other, ask("stays", [7], ENDLESS)))
            await until(lambda: engine.stats().running == 1)
            with raw_client(ipc(tmp_path)) as socket:
                send(socket, Submit.of(1, ask("x", [1], ENDLESS)))
                await until(lambda: engine.stats().waiting == 1)
            await until(lambda: len(engine.aborted) == 1, 3)
            assert not stays.done()
            stays.cancel()


async def test_a_client_that_does_not_read_is_cut_off_and_told(tmp_path: Path) -> None:
    def stuck(engine: FakeEngine) -> bool:
        return len(engine.aborted) == 2

    with threaded_worker(ipc(tmp_path), send_queue=2, max_context=10**6) as engine:
        async with connected(ipc(tmp_path)) as other:
            await other.wait_ready()
            with raw_client(ipc(tmp_path), rcvhwm=1) as socket:
                for i in range(2):
                    send(socket, Submit.of(i, ask("x", [1], 10**6)))
                await until(lambda: stuck(engine), 30)
                assert len(tokens(await collect(other, ask("y", [2], 50)))) == 50
                ends: dict[int, Emitted] = {}
                while len(ends) < 2:
                    replies = await asyncio.to_thread(receive, socket)
                    ends.update({reply.id: reply for reply in replies if isinstance(reply, Emitted) and reply.finish})
                assert {reply.finish for reply in ends.values()} == {FinishReason.ERROR}


async def test_a_request_that_the_engine_chokes_on_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with threaded_worker(ipc(tmp_path)) as engine:
        async with connected(ipc(tmp_path)) as client:
            await client.wait_ready()

            def choke(_: object) -> None:
                raise ZeroDivisionError("unforeseen")

            monkeypatch.setattr(engine, "add", choke)
            outputs = await collect(client, ask("a", [1], 1))
            assert outputs[-1].finish is FinishReason.ERROR and "unforeseen" in (outputs[-1].error or "")
            monkeypatch.undo()
            assert tokens(await collect(client, ask("b", [1], 1))) == [1]


async def test_the_first_signal_drains(tmp_path: Path) -> None:
    async with running(ipc(tmp_path), tokens_per_second=100) as child, connected(ipc(tmp_path)) as client:
        await client.wait_ready()
        task = asyncio.create_task(collect(client, ask("a", [1, 2], 60)))
        while (await client.stats()).running < 1:
            await asyncio.sleep(0.01)
        child.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.1)
        with pytest.raises(EngineUnavailable, match="takes no new"):
            await collect(client, ask("b", [1], 1))
        assert tokens(await task) == [1, 2] * 30
        assert await asyncio.wait_for(child.wait(), 10) == 0


async def test_the_second_signal_ends_at_once(tmp_path: Path) -> None:
    async with running(ipc(tmp_path), tokens_per_second=20) as child, connected(ipc(tmp_path)) as client:
        await client.wait_ready()
        task = asyncio.create_task(collect(client, ask("a", [1, 2], ENDLESS)))
        while (await client.stats()).running < 1:
            await asyncio.sleep(0.01)
        child.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
        assert child.returncode is None
        child.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(child.wait(), 2) == 128 + signal.SIGTERM
        with pytest.raises(EngineUnavailable):
            await task


async def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    async with running(ipc(tmp_path)) as child, connected(ipc(tmp_path)) as client:
        await client.wait_ready()
        assert child.stdin is not None
        child.stdin.close()  # what the kernel does when the parent is gone
        assert await asyncio.wait_for(child.wait(), 2) == 1


async def test_segments_that_cannot_travel_are_refused(tmp_path: Path) -> None:
    with threaded_worker(ipc(tmp_path)):
        async with connected(ipc(tmp_path)) as client:
            await client.wait_ready()
            request = ask("a", [1], 1)
            with pytest.raises(RequestError, match="a str segment"):
                await collect(client, type(request)("a", ["text"], request.sampling))
            assert client.inflight == 0
