"""Hosts an engine in a process: one loop in one thread that takes in what waits on the socket, steps, and sends.

The engine can be anything with the verbs of `Hosted`: it may make tokens, frames or pictures. Nothing here waits for a
client. A gateway that vanished, or whose queue is full, loses its requests and disturbs nobody else.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import signal
import sys
import time
from collections.abc import Iterable
from typing import Any, Protocol

import msgspec
import zmq

from ar_core.request import Output, QueueFull, Request, RequestError
from ar_core.stats import EngineStats
from streaming import messages, process
from streaming.messages import (
    Abort,
    Emitted,
    Hello,
    Invalid,
    ModelInfo,
    Overloaded,
    Ready,
    Reply,
    StatsQuery,
    StatsReply,
    Submit,
    Unavailable,
)

log = logging.getLogger(__name__)

_IDLE_MS = 200  # how long an idle engine sleeps at most before it looks whether it should stop
_OWING_MS = 20  # the same while a gateway has not taken what it is owed
_PROBE_SECONDS = 0.25  # a gateway that has requests and was sent nothing for so long is asked whether it is there
_RECEIVE_AT_MOST = 1024  # messages between two steps
_SEND_QUEUE = 1000  # messages that may wait for a gateway, each the outputs of a step
_LINGER_MS = 2000  # for the last words


class Hosted(Protocol):
    """What the engine of any modality looks like from here. `add` raises RequestError or QueueFull."""

    @property
    def has_work(self) -> bool: ...

    def add(self, request: Request) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def step(self) -> list[Output]: ...

    def stats(self) -> EngineStats: ...


class WorkerSpec(msgspec.Struct, frozen=True):
    """`factory` is "module:callable"; called with `arguments` it gives (engine, ModelInfo)."""

    name: str
    address: str
    factory: str
    arguments: dict[str, Any]
    log_level: str = "info"


class _Gateway:
    """A client of the engine, known by the identity that ZeroMQ gave its connection."""

    __slots__ = ("heard", "outbox", "requests")

    def __init__(self) -> None:
        self.requests: dict[int, str] = {}  # its ids -> the engine's
        self.outbox: list[Reply] = []
        self.heard = time.monotonic()  # when it was last sent something


class Worker:
    def __init__(self, engine: Hosted, info: ModelInfo, address: str, send_queue: int = _SEND_QUEUE) -> None:
        self._engine = engine
        self._info = info
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.router_mandatory = True  # or messages to those who are gone would vanish without a word
        self._socket.sndhwm = send_queue
        self._socket.rcvhwm = 0
        self._socket.linger = _LINGER_MS
        self._socket.bind(address)
        self._gateways: dict[bytes, _Gateway] = {}
        self._routes: dict[str, tuple[bytes, int]] = {}  # the engine's ids -> gateway and its id
        self._engine_ids = itertools.count(1)
        self._draining = False

    def drain(self) -> None:
        """Take nothing new, finish what runs, then return from `run`."""
        self._draining = True

    def run(self) -> int:
        """Serve until told to drain (0) or until the engine fails (1): then each request got an error as its end."""
        try:
            while self._routes or not self._draining:
                self._receive()
                if self._engine.has_work:
                    self._post(self._engine.step())
                self._flush()
        except Exception as error:  # of whatever kind: the engine's state can no longer be trusted
            log.exception("the engine failed")
            self._fail_all(f"the engine failed ({process.describe_error(error)}) and is being restarted")
            return 1
        else:
            return 0
        finally:
            self._socket.close()
            self._context.term()

    def _receive(self) -> None:
        if not self._engine.has_work:
            owing = any(gateway.outbox for gateway in self._gateways.values())
            self._socket.poll(_OWING_MS if owing else _IDLE_MS)
        for _ in range(_RECEIVE_AT_MOST):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._take(frames)

    def _take(self, frames: list[bytes]) -> None:
        identity = frames[0]
        try:
            command = messages.command_decoder.decode(b"".join(frames[1:]))
            gateway = self._gateways.setdefault(identity, _Gateway())
            self._handle(identity, gateway, command)
        except msgspec.DecodeError as error:
            log.warning("ignored %d bytes that are no message: %s", sum(map(len, frames[1:])), error)

    def _handle(self, identity: bytes, gateway: _Gateway, command: messages.Command) -> None:
        match command:
            case Submit():
                self._submit(identity, gateway, command)
            case Abort():
                engine_id = gateway.requests.pop(command.id, None)
                if engine_id is not None:
                    del self._routes[engine_id]
                    self._engine.abort(engine_id)
            case StatsQuery():
                gateway.outbox.append(StatsReply(command.id, self._engine.stats()))
            case Hello():
                gateway.outbox.append(Ready(self._info))

    def _submit(self, identity: bytes, gateway: _Gateway, command: Submit) -> None:
        if self._draining:
            gateway.outbox.append(Unavailable(command.id, "the engine is stopping and takes no new requests"))
            return
        engine_id = str(next(self._engine_ids))
        try:
            self._engine.add(command.request(engine_id))
        except RequestError as error:
            gateway.outbox.append(Invalid(command.id, str(error), error.param))
        except QueueFull as error:
            gateway.outbox.append(Overloaded(command.id, str(error)))
        except Exception as error:  # one strange request must not end all the others
            log.exception("a request could not be taken in")
            gateway.outbox.append(
                Emitted.failure(command.id, f"the request could not be taken in: {process.describe_error(error)}")
            )
        else:
            gateway.requests[command.id] = engine_id
            self._routes[engine_id] = (identity, command.id)

    def _post(self, outputs: Iterable[Output]) -> None:
        """Sort the outputs of a step by gateway."""
        for output in outputs:
            route = self._routes.get(output.request_id)
            if route is None:  # aborted: nobody waits for it
                continue
            identity, wire_id = route
            gateway = self._gateways[identity]
            gateway.outbox.append(Emitted.of(wire_id, output))
            if output.finish is not None:
                del self._routes[output.request_id]
                del gateway.requests[wire_id]

    def _flush(self) -> None:
        """One message for each gateway that is owed something, or that has been silent for long."""
        now = time.monotonic()
        for identity, gateway in list(self._gateways.items()):
            if gateway.outbox or (gateway.requests and now - gateway.heard > _PROBE_SECONDS):
                self._send(identity, gateway, now)

    def _send(self, identity: bytes, gateway: _Gateway, now: float) -> None:
        try:
            self._socket.send_multipart([identity, messages.encoder.encode(gateway.outbox)], zmq.NOBLOCK)
        except zmq.Again:
            self._give_up(gateway)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._abort_all(gateway)
            del self._gateways[identity]
        else:
            gateway.outbox.clear()
            gateway.heard = now

    def _give_up(self, gateway: _Gateway) -> None:
        """The gateway takes nothing more: end its requests. It learns that once it reads again, so they do not hang."""
        if not gateway.requests:
            return
        log.warning("a gateway does not read its messages; its %d requests are aborted", len(gateway.requests))
        for wire_id in gateway.requests:
            gateway.outbox.append(Emitted.failure(wire_id, "the gateway did not read the engine's messages in time"))
        self._abort_all(gateway)

    def _abort_all(self, gateway: _Gateway) -> None:
        for engine_id in gateway.requests.values():
            del self._routes[engine_id]
            self._engine.abort(engine_id)
        gateway.requests.clear()

    def _fail_all(self, reason: str) -> None:
        for identity, gateway in list(self._gateways.items()):
            gateway.outbox += [Emitted.failure(wire_id, reason) for wire_id in gateway.requests]
            gateway.requests.clear()
            if gateway.outbox:
                self._send(identity, gateway, time.monotonic())


def _stop_on_signals(worker: Worker) -> None:
    """The first signal drains, the second ends the process where it stands."""

    def stop(signum: int, _: object) -> None:
        signal.signal(signum, lambda *_: os._exit(128 + signum))
        worker.drain()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def main() -> int:
    """The process: `streaming.process.start("streaming.worker", WorkerSpec(...))`."""
    spec = process.receive(WorkerSpec)
    process.configure_logging(spec.log_level, f"engine {spec.name}")
    log.info("loading")
    started = time.monotonic()
    try:
        engine, info = process.imported(spec.factory)(**spec.arguments)
        worker = Worker(engine, info, spec.address)
    except Exception as error:  # whatever it is, the reader of the log needs one line that says it
        log.error("cannot serve %s: %s", spec.name, process.describe_error(error), exc_info=spec.log_level == "debug")
        return process.CANNOT_START
    gc.collect()
    gc.freeze()  # weights and modules live as long as the process: no collection needs to look at them
    _stop_on_signals(worker)
    log.info(
        "loaded in %.1f s: %s, %s, %d KV slots", time.monotonic() - started, info.device, info.dtype, info.kv_slots
    )
    return worker.run()


if __name__ == "__main__":
    sys.exit(main())
