"""A server without models and without the HTTP face: GET /MODEL/1,2,3/N streams N tokens of a fake engine.

python -m tests.streaming.fake_server FACTORY NAME... [--gateways=N] [--rate=TOKENS_PER_SECOND]
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
import sys
from contextlib import aclosing

from ar_core.config import EngineConfig
from ar_core.request import QueueFull, RequestError
from benchmarks.fake_engine import FakeEngine, make
from streaming import process
from streaming.client import EngineClient, EngineUnavailable
from streaming.messages import ModelInfo
from streaming.settings import GatewayConfig, ModelSettings, ServerSettings
from streaming.supervisor import Located, StartError, Supervisor, bind
from tests.streaming.hosting import ask


def build(name: str, checkpoint: str, config: dict[str, object]) -> tuple[FakeEngine, ModelInfo]:
    return make(name, tokens_per_second=float(checkpoint))


def build_broken(name: str, checkpoint: str, config: dict[str, object]) -> tuple[FakeEngine, ModelInfo]:
    raise FileNotFoundError("there are no weights here")


def run_gateway(config: GatewayConfig, sock: socket.socket) -> None:
    asyncio.run(_Gateway(config).run(sock))


class _Gateway:
    def __init__(self, config: GatewayConfig) -> None:
        self._clients = {engine.name: EngineClient(engine.address) for engine in config.engines}
        self._open: set[asyncio.Task[None]] = set()

    async def run(self, sock: socket.socket) -> None:
        for client in self._clients.values():
            await client.start()
        stopping = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
        server = await asyncio.start_server(self._accept, sock=sock)
        await stopping.wait()
        server.close()
        await asyncio.gather(*self._open)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode().strip("/")
        if path == "ready":
            ready = all(client.ready for client in self._clients.values())
            writer.write(f"HTTP/1.1 {200 if ready else 503} -\r\nConnection: close\r\n\r\n".encode())
        else:
            # In chunks, so that a client can tell an end from a break.
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
            await self._answer(*path.split("/"), writer)
            writer.write(b"0\r\n\r\n")
        writer.close()
        self._open.discard(task)

    async def _answer(self, model: str, prompt: str, count: str, writer: asyncio.StreamWriter) -> None:
        request = ask("x", [int(token) for token in prompt.split(",")], int(count))
        separator = ""
        try:
            async with aclosing(self._clients[model].submit(request)) as outputs:
                async for output in outputs:
                    writer.write(_chunk(separator + ",".join(map(str, output.tokens))))
                    separator = ","
        except (EngineUnavailable, QueueFull, RequestError) as error:
            writer.write(_chunk(str(error)))


def _chunk(text: str) -> bytes:
    data = text.encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("factory")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--rate", default="1000")
    arguments = parser.parse_args()
    process.configure_logging("info", "server")
    models = tuple(ModelSettings(name, arguments.rate, EngineConfig()) for name in arguments.models)
    settings = ServerSettings(models, port=0, gateways=arguments.gateways)
    supervisor = Supervisor(
        settings,
        [Located(model, model.source) for model in models],
        bind(settings),
        factory=arguments.factory,
        entry="tests.streaming.fake_server:run_gateway",
        announce=lambda line: print(line, flush=True),
    )
    try:
        return asyncio.run(supervisor.run())
    except StartError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
