"""`triptych serve`: one engine process for each model, gateway processes in front of them, all kept alive.

    listening socket ── inherited by ──▶ gateway × N ── ipc:// ──▶ engine × models

What dies after it was up is started again, a little later each time; what dies five times in quick succession stays
down.
What never comes up at all ends the server: a model that cannot be loaded will not load the next time either.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from streaming import process
from streaming.client import EngineClient
from streaming.gateway import GatewaySpec
from streaming.messages import ModelInfo
from streaming.settings import EngineAddress, GatewayConfig, ModelSettings, ServerSettings, SettingsError
from streaming.worker import WorkerSpec

log = logging.getLogger(__name__)

ENGINE_FACTORY = "streaming.factory:build"
GATEWAY_ENTRY = "streaming.http.server:run_gateway"

_QUICK_SECONDS = 30.0  # a process that lived shorter died quickly
_QUICK_DEATHS = 5  # in a row, then it stays down
_FIRST_DELAY = 0.2  # seconds before the first new start; twice as long before each further one
_ENGINE_DRAIN_SECONDS = 10.0  # engines have nothing to do any more once the gateways are gone
_BACKLOG = 2048  # connections that may wait to be accepted


class StartError(RuntimeError):
    """Something did not come up; the message is for the person who started the server."""


@dataclass(frozen=True, slots=True)
class Located:
    """A model whose checkpoint lies on this machine."""

    settings: ModelSettings
    checkpoint: str


def bind(settings: ServerSettings) -> socket.socket:
    """The server's TCP socket, not listening yet. Raises SettingsError in one line if the address cannot be had."""
    where = f"{settings.host}:{settings.port}"
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        raise SettingsError(f"cannot listen on {where}: {error.strerror}; pass another --host or --port") from None
    return sock


def url_of(sock: socket.socket) -> str:
    """Where a client on this machine reaches it."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _print_at_once(line: str) -> None:
    print(line, flush=True)  # also where it goes into a pipe, whose reader waits for it


class Supervisor:
    """Runs a server on a bound socket until it is told to stop.

    `factory` and `entry`: see WorkerSpec and GatewaySpec.
    """

    def __init__(
        self,
        settings: ServerSettings,
        models: Sequence[Located],
        sock: socket.socket,
        *,
        factory: str = ENGINE_FACTORY,
        entry: str = GATEWAY_ENTRY,
        announce: Callable[[str], None] = _print_at_once,
    ) -> None:
        self._settings = settings
        self._models = models
        self._sock = sock
        self._factory = factory
        self._entry = entry
        self._announce = announce
        self._engines: dict[str, asyncio.subprocess.Process] = {}
        self._gateways: dict[str, asyncio.subprocess.Process] = {}
        self._came_up: set[str] = set()
        self._stopping = asyncio.Event()
        self._killed = False

    async def run(self) -> int:
        """The exit status: 0 after a drain, 1 after a second signal. Raises StartError."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.stop)
        with tempfile.TemporaryDirectory(prefix="triptych-") as folder:  # mode 0700
            addresses = self._addresses(Path(folder))
            clients = [EngineClient(engine.address) for engine in addresses]
            keepers = self._start(addresses, Path(folder))
            try:
                for client in clients:
                    await client.start()
                await self._serve(clients, keepers)
            finally:
                self._stopping.set()
                for client in clients:
                    await client.close()
                await self._end_all(keepers)
                self._sock.close()
        return 1 if self._killed else 0

    def stop(self) -> None:
        """Once: let open answers finish. Twice: end everything now."""
        if self._stopping.is_set():
            log.info("stopping now")
            self._killed = True
            self._signal_all({**self._gateways, **self._engines}, signal.SIGKILL)
        else:
            log.info("stopping; open answers have %.0f s to finish", self._settings.drain_seconds)
            self._stopping.set()

    def _addresses(self, folder: Path) -> list[EngineAddress]:
        return [
            EngineAddress(model.settings.name, model.checkpoint, f"ipc://{folder}/engine-{index}")
            for index, model in enumerate(self._models)
        ]

    def _start(self, addresses: list[EngineAddress], folder: Path) -> list[asyncio.Task[None]]:
        """Every process gets a task that keeps it alive."""
        self._sock.listen(_BACKLOG)
        self._sock.set_inheritable(True)
        level = self._settings.log_level
        keepers = []
        for model, engine in zip(self._models, addresses):
            arguments = {
                "name": engine.name,
                "checkpoint": engine.checkpoint,
                "config": msgspec.to_builtins(model.settings.engine),
            }
            worker = WorkerSpec(engine.name, engine.address, self._factory, arguments, level)
            keepers.append(self._keep(f"engine {engine.name}", self._engines, "streaming.worker", worker))
        gateway = GatewaySpec(GatewayConfig(self._settings, tuple(addresses)), self._sock.fileno(), self._entry)
        environment = _metrics_environment(folder) if self._settings.gateways > 1 else {}
        for index in range(self._settings.gateways):
            name = f"gateway {index}"
            keepers.append(self._keep(name, self._gateways, "streaming.gateway", gateway, (gateway.fd,), environment))
        return [asyncio.create_task(keeper) for keeper in keepers]

    async def _keep(
        self,
        name: str,
        alive: dict[str, asyncio.subprocess.Process],
        module: str,
        spec: msgspec.Struct,
        fds: Sequence[int] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        """Start a process as often as it dies. Raises StartError if the server was not up yet."""
        quick_deaths = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            child = alive[name] = await process.start(module, spec, fds=fds, environment=environment)
            if self._stopping.is_set():  # told while it was being started
                child.kill()
            status = await child.wait()
            del alive[name]
            if self._stopping.is_set():
                return
            how = process.describe_exit(status)
            if name not in self._came_up:
                raise StartError(f"{name} could not start ({how})")
            quick_deaths = quick_deaths + 1 if time.monotonic() - started < _QUICK_SECONDS else 1
            if quick_deaths == _QUICK_DEATHS:
                log.error("%s died %d times in quick succession (%s); it stays down", name, quick_deaths, how)
                return
            delay = _FIRST_DELAY * 2 ** (quick_deaths - 1)
            log.error("%s died (%s); it is started again in %.1f s", name, how, delay)
            await _wait(self._stopping.wait(), delay)

    async def _serve(self, clients: list[EngineClient], keepers: list[asyncio.Task[None]]) -> None:
        """Announce the server once it can serve, then wait until it is told to stop."""
        stopping = asyncio.create_task(self._stopping.wait())
        starting = asyncio.create_task(self._wait_until_ready(clients))
        keeping = asyncio.gather(*keepers)  # ends early only with an error
        waits: list[asyncio.Future[Any]] = [stopping, starting, keeping]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if keeping.done():
            keeping.result()
        if starting.done():
            infos = starting.result()
            self._came_up |= {*self._engines, *self._gateways}
            self._announce(f"Triptych is ready: {url_of(self._sock)} ({'; '.join(map(_describe, infos))})")
            await stopping
        starting.cancel()
        stopping.cancel()

    async def _wait_until_ready(self, clients: list[EngineClient]) -> list[ModelInfo]:
        infos = list(await asyncio.gather(*(client.wait_ready() for client in clients)))
        while not await _answers_ready(url_of(self._sock)):
            await asyncio.sleep(0.1)
        return infos

    async def _end_all(self, keepers: list[asyncio.Task[None]]) -> None:
        """Gateways first, since they know which answers are open; engines when nobody asks them any more."""
        await self._end(self._gateways, self._settings.drain_seconds + 5)
        await self._end(self._engines, _ENGINE_DRAIN_SECONDS)
        await asyncio.gather(*keepers, return_exceptions=True)

    async def _end(self, alive: dict[str, asyncio.subprocess.Process], seconds: float) -> None:
        self._signal_all(alive, signal.SIGTERM)
        waits = [asyncio.create_task(child.wait()) for child in alive.values()]
        if waits:
            await asyncio.wait(waits, timeout=seconds)
        self._signal_all(alive, signal.SIGKILL)

    def _signal_all(self, alive: dict[str, asyncio.subprocess.Process], signum: signal.Signals) -> None:
        for child in alive.values():
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signum)


def _metrics_environment(folder: Path) -> dict[str, str]:
    """Where several gateways add up their metrics."""
    metrics = folder / "metrics"
    metrics.mkdir()
    return {"PROMETHEUS_MULTIPROC_DIR": str(metrics)}


def _describe(info: ModelInfo) -> str:
    return f"model {info.name}, {info.device}"


async def _wait(awaitable: Awaitable[Any], seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(awaitable, seconds)


async def _answers_ready(url: str) -> bool:
    """Whether GET /ready of some gateway says 200."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    try:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            writer.write(f"GET /ready HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            status = await reader.readline()
            writer.close()
    except (OSError, TimeoutError):
        return False
    return status.split()[1:2] == [b"200"]
