"""The one async client of an engine process: requests in, outputs out, over one DEALER socket.

    client = EngineClient("ipc:///tmp/.../0")
    await client.start()
    await client.wait_ready()
    async with aclosing(client.submit(request)) as outputs:
        async for output in outputs: ...

A connection is used until it breaks. Then all that ran on it fails at once, and a new socket waits for the next life of
the engine, so nothing of an old life can be taken for an answer of the new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator

import zmq
from zmq.utils.monitor import recv_monitor_message

from ar_core.request import Output, QueueFull, Request, RequestError
from ar_core.stats import EngineStats
from streaming import messages
from streaming.messages import Abort, Emitted, Hello, Invalid, ModelInfo, Overloaded, Ready, StatsReply, Unavailable

_RETRY_MS = 50  # between attempts to reach an engine that is not there
_BROKEN = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


class EngineUnavailable(RuntimeError):
    """The engine process is not there (yet, or any more), or takes no new requests."""


class _Mailbox:
    """What has arrived for one request and was not read yet."""

    __slots__ = ("_error", "_items", "_waiter")

    def __init__(self) -> None:
        self._items: list[Emitted] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Emitted) -> None:
        self._items.append(item)
        self._wake()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._wake()

    async def take(self) -> list[Emitted]:
        """All that is there, at least one. Raises what `fail` was given once the items before it are read."""
        if not self._items and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if not self._items:
            assert self._error is not None
            raise self._error
        items, self._items = self._items, []
        return items

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineClient:
    """One per engine and process, used from one event loop.

    `ready`: requests can be submitted. `failed`: the engine was there and is gone; it may come back. `info` is that of
    the engine's last life.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._reopening: asyncio.TimerHandle | None = None
        self._ids = itertools.count(1)
        self._mailboxes: dict[int, _Mailbox] = {}
        self._queries: dict[int, asyncio.Future[EngineStats]] = {}
        self._is_ready = asyncio.Event()
        self._absence = "the engine is starting"
        self.info: ModelInfo | None = None

    @property
    def ready(self) -> bool:
        return self._is_ready.is_set()

    @property
    def failed(self) -> bool:
        return self.info is not None and not self.ready

    @property
    def inflight(self) -> int:
        """Requests that the engine has not ended."""
        return len(self._mailboxes)

    async def start(self) -> None:
        """Begin to look for the engine; returns at once."""
        self._loop = asyncio.get_running_loop()
        self._open()

    async def wait_ready(self) -> ModelInfo:
        await self._is_ready.wait()
        assert self.info is not None
        return self.info

    async def close(self) -> None:
        """Everything in flight fails with EngineUnavailable; the engine notices and frees what belonged to it."""
        self._shut("the connection to the engine was closed")
        self._context.term()

    async def submit(self, request: Request) -> AsyncGenerator[Output, None]:
        """Outputs until one has `finish`; what arrives while the caller is busy comes as one.

        Closing the generator early, or cancelling the task that reads it, aborts the request. Raises EngineUnavailable,
        QueueFull and RequestError, the latter two before the first output.
        """
        wire_id = next(self._ids)
        command = messages.Submit.of(wire_id, request)
        mailbox = self._mailboxes[wire_id] = _Mailbox()  # before sending: the answer can be here when that returns
        try:
            self._send(command)
            while True:
                for output in messages.join(await mailbox.take(), request.id):
                    yield output
                    if output.finish is not None:
                        return
        finally:
            if self._mailboxes.pop(wire_id, None) is not None:
                with contextlib.suppress(EngineUnavailable):
                    self._send(Abort(wire_id))

    async def stats(self) -> EngineStats:
        """Raises EngineUnavailable."""
        wire_id = next(self._ids)
        answer = self._queries[wire_id] = asyncio.get_running_loop().create_future()
        try:
            self._send(messages.StatsQuery(wire_id))
            stats: EngineStats = await answer
            return stats
        finally:
            self._queries.pop(wire_id, None)

    def _send(self, command: messages.Command) -> None:
        if not self.ready or self._socket is None:
            raise EngineUnavailable(self._absence)
        try:
            data = messages.encoder.encode(command)
        except OverflowError:
            raise RequestError("a number in the request does not fit into 64 bits") from None
        self._socket.send(data, zmq.NOBLOCK)
        self._receive()  # sending may have taken up the event that announces a message

    def _open(self) -> None:
        self._reopening = None
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.sndhwm = 0  # a send never blocks: the gateway's own limits bound what waits here
        self._socket.reconnect_ivl = _RETRY_MS
        self._monitor = self._socket.get_monitor_socket(_BROKEN)
        self._loop.add_reader(_fd(self._monitor), self._watch)
        self._loop.add_reader(_fd(self._socket), self._receive)
        self._socket.connect(self._address)
        self._socket.send(messages.encoder.encode(Hello()), zmq.NOBLOCK)
        self._receive()
        self._watch()

    def _watch(self) -> None:
        """The connection's end, reported by ZeroMQ the moment the other process is gone."""
        if self._monitor is None:
            return
        try:
            recv_monitor_message(self._monitor, zmq.NOBLOCK)
        except zmq.Again:
            return
        self._receive()  # the last words come before the end
        self._shut("the engine stopped; the request can be sent again once it is back" if self.info else self._absence)
        self._reopening = self._loop.call_later(_RETRY_MS / 1000, self._open)

    def _shut(self, reason: str) -> None:
        self._is_ready.clear()
        self._absence = reason
        if self._reopening is not None:
            self._reopening.cancel()
        if self._socket is not None and self._monitor is not None:
            self._loop.remove_reader(_fd(self._socket))
            self._loop.remove_reader(_fd(self._monitor))
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=0)
            self._socket = self._monitor = None
        mailboxes, self._mailboxes = self._mailboxes, {}
        for mailbox in mailboxes.values():
            mailbox.fail(EngineUnavailable(reason))
        for query in self._queries.values():
            if not query.done():
                query.set_exception(EngineUnavailable(reason))

    def _receive(self) -> None:
        """Take in all that has arrived. ZeroMQ announces messages once, not as long as there are some."""
        while self._socket is not None:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            for reply in messages.reply_decoder.decode(data):
                self._dispatch(reply)

    def _dispatch(self, reply: messages.Reply) -> None:
        match reply:
            case Emitted(finish=None):
                mailbox = self._mailboxes.get(reply.id)
                if mailbox is not None:  # else it was aborted here and the engine did not know yet
                    mailbox.put(reply)
            case Emitted():
                mailbox = self._mailboxes.pop(reply.id, None)
                if mailbox is not None:
                    mailbox.put(reply)
            case Ready():
                self.info = reply.info
                self._is_ready.set()
            case Invalid():
                self._refuse(reply.id, RequestError(reply.message, reply.param))
            case Overloaded():
                self._refuse(reply.id, QueueFull(reply.message))
            case Unavailable():
                self._refuse(reply.id, EngineUnavailable(reply.message))
            case StatsReply():
                query = self._queries.get(reply.id)
                if query is not None and not query.done():
                    query.set_result(reply.stats)

    def _refuse(self, wire_id: int, error: Exception) -> None:
        mailbox = self._mailboxes.pop(wire_id, None)
        if mailbox is not None:
            mailbox.fail(error)


def _fd(socket: zmq.Socket[bytes]) -> int:
    return int(socket.getsockopt(zmq.FD))
